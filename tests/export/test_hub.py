"""Hub ids in the local cache: found without the network, and their weights linked into bundles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny_models import tiny_llava

from trimvlm.errors import UserError
from trimvlm_export.hub import is_hub_id, resolve_checkpoint
from trimvlm_export.source import Source
from trimvlm_tools.cli import main

ID = "some-org/tiny.llava-hf"
COMMIT = "a" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `hf download` leaves it: files of a snapshot are links to blobs."""
    directory = tmp_path_factory.mktemp("cache")
    model = directory / "hub" / f"models--{ID.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    for each in (model / "blobs", model / "refs", snapshot):
        each.mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    for number, file in enumerate(sorted(tiny_llava(directory / "saved", layers=2).iterdir())):
        shutil.copyfile(file, model / "blobs" / f"{number:064}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:064}")
    return directory / "hub"


@pytest.fixture
def in_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as this process' own: the variable is read when the library is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    return cache


def test_the_users_own_cache(cache: Path, tmp_path: Path) -> None:
    code = f"from trimvlm_export.hub import resolve_checkpoint as r; print(r({ID!r}))"
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    found = Path(done.stdout.strip())
    assert found.name == COMMIT and found.is_relative_to(cache) and (found / "config.json").is_file()


def test_what_is_an_id(in_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("llava-hf/llava-1.5-7b-hf") and is_hub_id("Qwen/Qwen2.5-VL-3B-Instruct")
    for path in ("model", "./a/b", "../b", "/a/b", "a/b/c", "a/b.yaml", "a/", "a/b c"):
        assert not is_hub_id(path) and resolve_checkpoint(path) == Path(path)
    assert resolve_checkpoint(ID) != Path(ID)
    (tmp_path / ID).mkdir(parents=True)
    assert resolve_checkpoint(ID) == Path(ID)  # what is here goes first


@pytest.mark.parametrize("name", ["some-org/other", "some-org/dots..in-a-row"])
def test_what_is_not_in_the_cache(name: str, in_cache: Path) -> None:
    with pytest.raises(UserError) as raised:
        resolve_checkpoint(name)
    assert str(raised.value) == (
        f"{name}: no such directory, and no such model in the local Hugging Face cache ({in_cache}); "
        f"trimvlm downloads nothing, fetch it with: hf download {name}"
    )


@pytest.mark.parametrize(
    "arguments", [["export"], ["calibrate", "--method", "vtw", "--data", "demo"]], ids=["export", "calibrate"]
)
def test_verbs_take_ids(
    arguments: list[str], in_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that is there without its configuration they say so, with the place where it is."""
    verb, *options = arguments
    out = str(tmp_path / "out.yaml")
    assert main([verb, "some-org/other", *options, "--out", out]) == 2
    assert "hf download some-org/other" in capsys.readouterr().err
    (snapshot,) = in_cache.glob("*/snapshots/*")
    config = snapshot / "config.json"
    target = config.readlink()
    config.unlink()
    try:
        assert main([verb, ID, *options, "--out", out]) == 2
        assert str(snapshot) in capsys.readouterr().err
    finally:
        config.symlink_to(target)


def test_weights_are_linked_to_the_blob(in_cache: Path, tmp_path: Path) -> None:
    snapshot = resolve_checkpoint(ID)
    linked = snapshot / "model.safetensors"
    before = linked.stat().st_nlink
    source = Source.place(snapshot, tmp_path / "bundle", "float32")
    placed = tmp_path / "bundle" / source.weight_files[0]
    assert linked.is_symlink() and not placed.is_symlink()
    assert placed.samefile(linked) and placed.stat().st_nlink == before + 1
    assert not any((tmp_path / "bundle" / name).is_symlink() for name in source.files)
    Source.place(snapshot, tmp_path / "bundle", "float32")  # again: it is there
    assert placed.stat().st_nlink == before + 1
    converted = Source.place(snapshot, tmp_path / "half", "float16")
    assert (tmp_path / "half" / converted.weight_files[0]).stat().st_size < 0.6 * placed.stat().st_size
