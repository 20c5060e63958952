"""Blocks of layers as plans of TensorRT on the stand-in: the tokens of ONNX Runtime. No GPU takes part."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tensorrt_standin import StandIn
from tiny_models import noise_image

from trimvlm.session import Session
from trimvlm.target import Limits
from trimvlm_engines import targets
from trimvlm_engines.build import build

LIMITS = Limits(images=2, text=32, new_tokens=16, lm_head_columns=24, layers_per_engine=2)


def answer(bundle: Path, method: str, target: str) -> list[str]:
    with Session.open(bundle, method, target) as session:
        return list(session.generate("what is w3 ?", [noise_image(1)], max_new_tokens=8))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    ("device", "ranges"),
    [("rtx-4090", "joint"), ("rtx-4090", "split"), ("jetson-orin-nano-8gb", "joint")],
)
@pytest.mark.parametrize("method", ["dense", "fastv+v-skip", "vtw", "hidivdrop"])
def test_plans_of_blocks_answer_as_the_whole_graph(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, device: str, ranges: str
) -> None:
    target = msgspec.structs.replace(targets.load(device), limits=LIMITS, ranges=ranges)
    assert target.compute_capability
    standin = StandIn(monkeypatch, capability=target.compute_capability)
    engine = build(bundle, target, method)
    assert [role for role in engine.graphs if role.startswith("decoder")] == [
        f"decoder.{number}" for number in range(3)
    ]
    assert answer(bundle, method, device) == answer(bundle, method, "ort-cpu")
    standin.device.assert_clean()
