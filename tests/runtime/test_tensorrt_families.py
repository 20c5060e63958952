"""Plans on the stand-in for TensorRT where one LLaVA profile is not all: grids, M-RoPE, routers, choices.

No GPU takes part.
"""

from __future__ import annotations

import gc
from pathlib import Path

import msgspec
import pytest
from method_decisions import LAYERS, METHODS
from PIL import Image
from skimage import data
from tensorrt_standin import RefusedError, StandIn
from tiny_models import noise_image, tiny_llava
from tiny_qwen import tiny_qwen

from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, HiPrune
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select
from trimvlm.router_spec import RouterSpec
from trimvlm.rules import LastRowAttention, RouterScores
from trimvlm.session import Session
from trimvlm.target import Limits, Target
from trimvlm.text import Turn
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_export.router import Router, draw_parameters
from trimvlm_export.router_weights import digest, encode

CARD, BOARD = "rtx-4090", "jetson-orin-nano-8gb"
LIMITS = Limits(images=2, text=32, new_tokens=16)
GRIDS = {"wide": ((3, 7), (196, 84)), "tall": ((7, 3), (84, 196))}
QUESTIONS = ["what is the color of w3 ?", "where is the w9 ?", "how many w5 are there ?", "w1 w2", "w30 ?"]


def target(name: str) -> Target:
    return msgspec.structs.replace(targets.load(name), limits=LIMITS, compute_capability="8.9")


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandIn:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return StandIn(monkeypatch)


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5-VL: a profile for two grids, and one with an encoder stage for one of them."""
    directory = tmp_path_factory.mktemp("grids")
    checkpoint = tiny_qwen(directory / "model", "qwen2_5_vl", layers=2, vision_layers=2, old_names=False)
    fastv = Decisions(select=(Select(layer=1, keep=5, by=LastRowAttention(attention="previous")),))
    stage = EncoderStage(keep=6, by=HiPrune(alpha=0.5, object_layer=0, deep_layer=1))
    (wide, _), (tall, _) = GRIDS.values()
    for name, each, grid in (
        ("fastv", fastv, wide),
        ("fastv", fastv, tall),
        ("hiprune", Decisions(encoder=stage), wide),
    ):
        profile = Profile(
            name=name, method=Method(name=name), model=model_spec(checkpoint, grid), decisions=each
        )
        export(checkpoint, profile, directory / "bundle")
    return directory / "bundle"


@pytest.mark.parametrize("on", [CARD, BOARD])
@pytest.mark.parametrize("name", ["fastv", "hiprune"])
def test_grids_and_coordinates(standin: StandIn, grids: Path, name: str, on: str) -> None:
    """Each prompt on the profile of its grid; two images, and a conversation."""
    members = [each for each in Bundle(grids).manifest.profiles if each.partition("@")[0] == name]
    for member in members:
        build(grids, target(on), member)
    pictures = [Image.fromarray(data.astronaut()).resize(size) for _, size in GRIDS.values()]
    history = [Turn(text="what is w3 ?", images=1, answer="w9 w4")]
    answers = []
    for each in ("ort-cpu", on):
        with Session.open(grids, name, each) as session:
            said = []
            for images, past in (
                (pictures[:1], []),
                (pictures[1:], []),
                ([], []),
                ([pictures[0]] * 2, history),
                (pictures[:1], []),
            ):
                pieces = session.generate("how many w7 ?", images, history=past, max_new_tokens=9)
                said.append((session.member, "".join(pieces)))
            answers.append(said)
    assert answers[1] == answers[0]
    assert {member for member, _ in answers[0]} == set(members)
    standin.device.assert_clean()


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A router with random weights, and a choice of two profiles that it decides between."""
    directory = tmp_path_factory.mktemp("routed")
    checkpoint = tiny_llava(directory / "model", layers=LAYERS, kv_heads=2)
    model = model_spec(checkpoint)
    spec = RouterSpec(weights="one.router.safetensors", sha256="", width=24, heads=2, first=LAYERS - 2)
    router = Router(spec, model.hidden, model.layers).requires_grad_(False)
    draw_parameters(router, 1)
    for name, parameter in router.named_parameters():
        if "layer_head" in name:
            parameter.mul_(-3.0)
    weights = {name: array.numpy() for name, array in router.state_dict().items()}
    (directory / spec.weights).write_bytes(encode(weights))
    spec = msgspec.structs.replace(spec, sha256=digest(weights))
    ranked = (Select(layer=1, keep=5, by=RouterScores()),)
    for number, layer in enumerate((LAYERS - 2, LAYERS - 1)):
        skipped = (LayerRule(layers=(layer,), execute="none"),)
        profile = Profile(
            name=f"par-{number}",
            choice="par",
            method=Method(name="par"),
            model=model,
            decisions=Decisions(select=ranked if number else (), layers=skipped),
            router=spec,
        )
        export(checkpoint, profile, directory / "bundle", beside=directory)
    return directory / "bundle"


@pytest.mark.parametrize("turns", [None, True])
@pytest.mark.parametrize("on", [CARD, BOARD])
def test_a_router_chooses(standin: StandIn, routed: Path, on: str, turns: bool | None) -> None:
    for name in ("par-0", "par-1"):
        build(routed, target(on), name)
    answers = []
    for each in ("ort-cpu", on):
        options = {"turns": turns} if each != "ort-cpu" else {}
        for name in ("par", "par-1"):
            with Session.open(routed, name, each, **options) as session:
                for seed, question in enumerate(QUESTIONS):
                    pieces = session.generate(question, [noise_image(seed)], max_new_tokens=6)
                    answers.append((name, session.member, "".join(pieces)))
    half = len(answers) // 2
    assert answers[half:] == answers[:half]
    assert len(set(answers)) > 2
    standin.device.assert_clean()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With decoders that are never fed an empty tensor."""
    directory = tmp_path_factory.mktemp("filled")
    checkpoint = tiny_llava(directory / "model", layers=LAYERS)
    name = "hidivdrop"
    profile = Profile(
        name=name, method=Method(name=name), model=model_spec(checkpoint), decisions=METHODS[name]
    )
    export(checkpoint, profile, directory / "bundle", filled=True)
    return directory / "bundle"


@pytest.mark.parametrize("on", [CARD, BOARD])
def test_a_library_that_runs_no_empty_tensors(standin: StandIn, filled: Path, on: str) -> None:
    """One field of the target is what a user changes then."""
    standin.runs_empty = False

    def answers(name: str) -> list[str]:
        with Session.open(filled, target=name) as session:
            return [
                "".join(session.generate(text, [noise_image(1)][:images], max_new_tokens=8))
                for text, images in ((QUESTIONS[0], 1), (QUESTIONS[1], 0))
            ]

    build(filled, target(on))
    with pytest.raises(RefusedError, match="is empty, which this library does not run"):
        answers(on)
    build(filled, msgspec.structs.replace(target(on), empty_tensors=False))
    assert answers(on) == answers("ort-cpu")
    gc.collect()  # of the refusal's traceback
    standin.device.assert_clean()
