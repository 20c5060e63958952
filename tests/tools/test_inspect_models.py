"""`trimvlm inspect` of models: what is there, and what export would make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.numpy import load_file
from tiny_mobilevlm import tiny_mobilevlm
from tiny_models import tiny_llava
from tiny_qwen import tiny_qwen
from tiny_tiled import tiny_internvl, tiny_next, tiny_onevision

from trimvlm_tools.cli import main


class Case(NamedTuple):
    """A model, the size of an image, and what follows: worked out by hand."""

    make: Callable[[Path], Path]
    size: str
    grid: list[int]
    tokens: int
    pixels: list[int]


CASES = {
    "qwen2_vl": Case(lambda path: tiny_qwen(path, shard="100KB"), "280x140", [5, 10], 50, [200, 1176]),
    "qwen2_5_vl": Case(lambda path: tiny_qwen(path, "qwen2_5_vl", tie=True), "56x84", [3, 2], 6, [24, 1176]),
    # 4 x 4 tokens of the whole image, then 4 rows of 8 and a newline
    "llava_next": Case(tiny_next, "640x320", [4, 8], 16 + 4 * 9, [3, 3, 32, 32]),
    "llava_onevision": Case(
        lambda path: tiny_onevision(path, tie=True), "58x29", [3, 6], 9 + 3 * 7, [3, 3, 29, 29]
    ),
    # 2 x 3 tiles of 3 x 3 tokens, and the thumbnail
    "internvl": Case(tiny_internvl, "600x400", [6, 9], 7 * 9, [7, 3, 48, 48]),
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def inspected(capsys: pytest.CaptureFixture[str], *arguments: Path | str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)["model"]


def test_in_full(llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspected(capsys, llava, "--text", "8")
    assert report["family"] == "llava" and report["exportable"] and report["problems"] == []
    assert {key: report["text"][key] for key in ("layers", "hidden", "heads", "kv_heads", "tied")} == {
        "layers": 4, "hidden": 64, "heads": 4, "kv_heads": 4, "tied": False,
    }  # fmt: skip
    vision, image, stored = report["vision"], report["image"], report["stored"]
    assert (vision["model_type"], vision["cls"], vision["patches"]) == ("clip_vision_model", True, 16)
    assert vision["features"] == [2] and vision["layers"] == 3
    assert (image["processing"]["kind"], image["visual_tokens"]) == ("single_view", 16)
    tensors = load_file(llava / "model.safetensors")
    assert stored["tensors"] == len(tensors) == stored["dtypes"]["float32"]["tensors"]
    assert stored["parameters"] == sum(value.size for value in tensors.values())
    assert stored["bytes"] == 4 * stored["parameters"]
    assert stored["files"] == {"model.safetensors": (llava / "model.safetensors").stat().st_size}
    used = report["tensors"]["consumed"]
    decoder = {name: value for name, value in tensors.items() if name.startswith(("language", "lm_head"))}
    assert used["decoder"] == {
        "tensors": len(decoder),
        "parameters": sum(value.size for value in decoder.values()),
        "bytes": sum(value.nbytes for value in decoder.values()),
    }
    assert used["vision"]["tensors"] == len(tensors) - len(decoder) - len(report["tensors"]["ignored"])
    assert len(report["tensors"]["ignored"]) == 18  # a layer's 16, and the final norm
    # 2 (keys, values) x 4 heads x 16 x 2 bytes x 4 layers
    assert report["kv_bytes_per_token"] == 1024
    assert report["profile"]["kv"]["bytes"] == 1024 * (16 + 8)
    assert report["prompt"] == "USER: <image> ... ASSISTANT:"


def test_published_names_and_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A family that transformers does not have, without a processor's files."""
    report = inspected(capsys, tiny_mobilevlm(tmp_path, shards=3))
    assert report["family"] == "mobilevlm" and report["problems"] == []
    assert len(report["stored"]["files"]) == 3 and report["image"]["visual_tokens"] == 144
    used = report["tensors"]
    assert report["stored"]["tensors"] == sum(
        each["tensors"] for each in (*used["consumed"].values(), used["ignored_sizes"])
    )


@pytest.mark.parametrize("family", CASES)
def test_models_whose_images_have_grids(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[family]
    case.make(tmp_path)
    report = inspected(capsys, tmp_path, "--image-size", case.size)
    assert (report["family"], report["problems"]) == (family, [])
    assert (report["image"]["grid"], report["image"]["natural"]) == (case.grid, True)
    assert report["image"]["visual_tokens"] == report["profile"]["flops"]["n"] == case.tokens
    vision = report["graphs"]["vision"]
    assert [vision["inputs"][0]["dims"], vision["outputs"][0]["dims"]] == [case.pixels, [case.tokens, 64]]
    stored, used = report["stored"], report["tensors"]
    assert len(stored["files"]) == len(list(tmp_path.glob("*.safetensors")))
    assert stored["tensors"] == sum(
        each["tensors"] for each in (*used["consumed"].values(), used["ignored_sizes"])
    )

    without = inspected(capsys, tmp_path)
    # The rest is the same without the size; what depends on it is not known.
    for key in ("stored", "tensors", "text", "kv_bytes_per_token", "prompt", "exportable"):
        assert without[key] == report[key]
    assert without["image"]["processing"] == report["image"]["processing"]
    assert without["graphs"]["decoder"] == report["graphs"]["decoder"]
    for unknown in (without["profile"], without["graphs"]["vision"], without["image"]["visual_tokens"]):
        assert unknown is None
    assert main(["inspect", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "depend on the image: give its size, --image-size WxH" in said
    assert said.splitlines()[-1] == "export takes it, with --image-size WxH"


def test_sizes_that_have_no_grid_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_qwen(tmp_path / "qwen")
    assert main(["inspect", str(tmp_path / "qwen"), "--image-size", "9000x10"]) == 2
    assert "no grid of visual tokens has the shape of 9000x10 pixels" in capsys.readouterr().err
    tiny_next(tmp_path / "next")
    report = inspected(capsys, tmp_path / "next", "--image-size", "2010x1000")
    assert (report["image"]["grid"], report["image"]["natural"]) == ([4, 8], False)
    assert main(["inspect", str(tmp_path / "next"), "--image-size", "2010x1000"]) == 0
    assert "grid 4x8, 52 visual tokens; they are made to fit it" in capsys.readouterr().out


def test_for_people(llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(llava)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"model {llava}: llava\n",
        "text model: llama, 4 layers, width 64, FFN 96, 4/4 heads of 16, vocabulary 64\n",
        "every image is one view: 16 visual tokens",
        "16  tower layer 2 comes after the feature layer -2",
        "past_key.0-3       [1, 4, past_0, 16]",
        "KV cache of a token, float16: 1,024 bytes",
        "chat template: 'USER: <image> ... ASSISTANT:'",
    ):
        assert part in out
    assert out.splitlines()[-1] == "export takes it"
