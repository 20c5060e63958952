"""Engines of profiles with an encoder stage: tower, projector and decoder, each a plan of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_models import noise_image, tiny_llava

from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, MsvPrune, VisionZip
from trimvlm.profile import Decisions, Method, Profile
from trimvlm.session import Session
from trimvlm_engines import targets
from trimvlm_engines.build import build, parts

STAGES = {
    "msv-prune": EncoderStage(keep=12, by=MsvPrune(attention=1, middle=1, last=3)),
    "visionzip": EncoderStage(keep=6, by=VisionZip(contextual=2, attention=1, keys=1)),
}
ROLES = ("vision", "projector", "decoder")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trimvlm_export.checkpoint import model_spec
    from trimvlm_export.export import export

    directory = tmp_path_factory.mktemp("stages")
    checkpoint = tiny_llava(directory / "checkpoint", layers=1)
    for name, stage in STAGES.items():
        profile = Profile(
            name=name,
            method=Method(name=name),
            model=model_spec(checkpoint),
            decisions=Decisions(encoder=stage),
        )
        export(checkpoint, profile, directory / "bundle")
    return directory / "bundle"


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def built(bundle: Path, target: str, profile: str) -> dict[str, str]:
    """Builds; the last state of each role."""
    states: dict[str, str] = {}
    build(bundle, target, profile, tell=lambda role, state: states.update({role: state}))
    return states


def test_the_decoder_is_built_for_the_rows_that_stay_the_projector_for_all(bundle: Path) -> None:
    opened, target = Bundle(bundle), targets.load("rtx-4090")
    found = {name: parts(opened, *opened.entry(name), target) for name in STAGES}
    assert list(found["msv-prune"]) == ["vision", "projector", "decoder"]
    assert found["msv-prune"]["projector"] == found["visionzip"]["projector"]
    images, zipped = target.limits.images, found["visionzip"]
    assert zipped["projector"].ranges["features"].plain() == [[1, 32], [16, 32], [16 * images, 32]]
    assert zipped["decoder"].ranges["visual"].plain() == [[0, 64], [6, 64], [6 * images, 64]]
    assert zipped["vision"].plan == "vision-tower-cls1-keys1.rtx-4090.engine"


def test_onnx_runtime_runs_all_three(bundle: Path) -> None:
    assert built(bundle, "ort-cpu", "msv-prune") == dict.fromkeys(ROLES, "built")
    states = built(bundle, "ort-cpu", "visionzip")
    assert states == {"vision": "built", "projector": "up to date", "decoder": "built"}
    with Session.open(bundle, "visionzip") as session:
        assert session.visual([noise_image(1)]).rows.shape == (6, 64)


def test_tensorrt_rtx_plans(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert built(bundle, "rtx-4090", "msv-prune") == dict.fromkeys(
        ("vision", "projector", "decoder"), "built"
    )
    states = built(bundle, "rtx-4090", "visionzip")
    assert states == {"vision": "built", "projector": "up to date", "decoder": "built"}
    opened = Bundle(bundle)
    engines = {name: opened.manifest.profiles[name].engines["rtx-4090"] for name in STAGES}
    assert engines["msv-prune"].graphs == {
        "vision": "vision-tower-cls1-features1-features3.rtx-4090.engine",
        "projector": "projector.rtx-4090.engine",
        "decoder": "msv-prune.rtx-4090.decoder.engine",
    }
    assert engines["visionzip"].graphs["projector"] == "projector.rtx-4090.engine"
    weights = 4 * (32 * 64 + 64 * 64)
    assert opened.path("projector.rtx-4090.engine").stat().st_size > weights, "the plan holds its weights"
    assert built(bundle, "rtx-4090", "msv-prune") == dict.fromkeys(ROLES, "up to date")
    opened.verify()
