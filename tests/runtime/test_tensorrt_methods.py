"""Every shipped method's tokens, from plans on the stand-in for TensorRT and from ONNX Runtime: the same.

Both lowerings: `fused` for TensorRT-RTX, `primitive` for TensorRT 10.3. No GPU takes part.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from method_decisions import LAYERS, METHODS, MORE
from shared_bundle import shared_bundle
from tensorrt_standin import StandIn
from tiny_models import noise_image

from trimvlm.session import Session
from trimvlm.target import Limits, Target
from trimvlm_calib.methods import discover
from trimvlm_engines import targets
from trimvlm_engines.build import build

EVERY = {**METHODS, **MORE}
TARGETS = ("rtx-4090", "jetson-orin-nano-8gb")
LIMITS = Limits(images=2, text=16, new_tokens=16)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By profile the bundle that holds it, float32."""
    found: dict[str, Path] = {}
    for number, decisions in enumerate((METHODS, MORE)):
        shared = shared_bundle(tmp_path_factory, decisions, LAYERS)
        copied = shutil.copytree(shared, tmp_path_factory.mktemp("methods") / f"{number}")
        found |= dict.fromkeys(decisions, Path(copied))
    return found


def target(name: str) -> Target:
    return msgspec.structs.replace(targets.load(name), limits=LIMITS, compute_capability="8.9")


def answers(bundle: Path, profile: str, on: str) -> list[str]:
    """To several prompts in one session: with an image, without, with two, the first again."""
    asked = [
        ("what is the color of w3 ?", 1, 10),
        ("how many w7 ?", 0, 4),
        ("where is the w9 ?", 2, 6),
        ("what is the color of w3 ?", 1, 10),
    ]
    with Session.open(bundle, profile, on) as session:
        return [
            "".join(session.generate(text, [noise_image(n) for n in range(images)], max_new_tokens=count))
            for text, images, count in asked
        ]


def test_every_shipped_method_is_here() -> None:
    """But for the router's, which `test_tensorrt_families.py` has."""
    methods = {part for name in EVERY for part in name.split("+")}
    assert discover().keys() - methods == {"par"}


@pytest.mark.slow
@pytest.mark.parametrize("profile", EVERY)
def test_tokens_are_those_of_onnx_runtime(
    bundles: dict[str, Path], profile: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = bundles[profile]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = answers(bundle, profile, "ort-cpu")
    assert wanted[0] == wanted[3] and len(set(wanted)) == 3 and all(wanted)
    for name in TARGETS:
        standin = StandIn(monkeypatch)
        build(bundle, target(name), profile)
        assert answers(bundle, profile, name) == wanted
        standin.device.assert_clean()
