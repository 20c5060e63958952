"""A bundle with a profile for several grids: each prompt runs on the one that its image needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from skimage import data
from tiny_models import tiny_llava
from tiny_qwen import tiny_qwen

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.session import Session
from trimvlm_tools.cli import main

WIDE, TALL = (196, 84), (84, 196)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("grids")
    checkpoint = tiny_qwen(directory / "model", layers=2, vision_layers=2)
    for width, height in (WIDE, TALL):
        size = ["--image-size", f"{width}x{height}"]
        assert main(["export", str(checkpoint), "--out", str(directory / "bundle"), *size]) == 0
    return directory / "bundle"


def photograph(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(data.astronaut()).resize(size)


def test_the_grids_share_the_weights(bundle: Path) -> None:
    manifest = Bundle(bundle).manifest
    assert sorted(manifest.profiles) == ["dense@3x7", "dense@7x3"]
    assert len(manifest.weights) == 1
    assert {entry.vision for entry in manifest.profiles.values()} == {"vision-3x7.onnx", "vision-7x3.onnx"}


@pytest.mark.parametrize(
    ("size", "member"),
    [(WIDE, "dense@3x7"), (TALL, "dense@7x3"), ((301, 200), "dense@3x7"), ((40, 55), "dense@7x3")],
)
def test_an_image_gets_its_grid_or_the_nearest(bundle: Path, size: tuple[int, int], member: str) -> None:
    question, image = "what is w3 ?", photograph(size)
    with Session.open(bundle, member) as alone:
        wanted = "".join(alone.generate(question, [image], max_new_tokens=8))
    for name in (None, "dense"):
        with Session.open(bundle, name) as session:
            assert "".join(session.generate(question, [image], max_new_tokens=8)) == wanted
            assert (session.profile, session.member) == ("dense", member)
            list(session.generate(question, max_new_tokens=1))  # without an image any of them will do


def test_a_file_says_its_grid_too(bundle: Path, tmp_path: Path) -> None:
    photograph(TALL).save(tmp_path / "tall.png")
    with Session.open(bundle) as session:
        list(session.generate("what is w3 ?", [tmp_path / "tall.png"], max_new_tokens=1))
        assert session.member == "dense@7x3"


def test_steps_one_by_one_need_one_grid(bundle: Path) -> None:
    with Session.open(bundle) as session, pytest.raises(UserError, match="open one of dense@3x7, dense@7x3"):
        session.prompt("what is w3 ?", 1)


def test_an_unknown_name_says_what_there_is(bundle: Path) -> None:
    with pytest.raises(UserError, match="no profile 'fastv'; it holds dense@3x7, dense@7x3"):
        Session.open(bundle, "fastv")


def test_sizes_that_no_grid_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {
        "no grid of this model": tiny_qwen(tmp_path / "qwen"),
        "leave it out": tiny_llava(tmp_path / "llava"),
    }
    for said, checkpoint in models.items():
        arguments = ["export", str(checkpoint), "--out", str(tmp_path / "bundle")]
        assert main([*arguments, "--image-size", "9000x5"]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "bundle").exists()
