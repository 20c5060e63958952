"""`trimvlm inspect` of bundles, and which options belong to what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from tiny_models import tiny_llava
from toy_bundle import write_toy_bundle

from trimvlm.bundle import Bundle
from trimvlm_tools.cli import main
from trimvlm_tools.inspection.graphs import graph_table, values


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"), layers=2)


@pytest.fixture(scope="module")
def bundle(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    assert main(["export", str(llava), "--out", str(out)]) == 0
    return out


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


def inspected(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_said_of_a_model_is_what_export_writes(
    llava: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, report = inspected(capsys, llava)["model"], inspected(capsys, bundle)
    assert model["tensors"]["ignored"] == report["bundle"]["ignored_tensors"]
    (profile,) = report["profiles"]
    graphs = {graph["role"]: graph for graph in profile["graphs"]}
    assert list(graphs) == ["vision", "decoder, fused", "decoder, primitive", "decoder, in_place"]
    for role in ("decoder, fused", "decoder, primitive"):
        for side in ("inputs", "outputs"):
            written = [(value["name"], value["dims"]) for value in graphs[role][side]]
            assert written == [(value["name"], value["dims"]) for value in model["graphs"]["decoder"][side]]
        sizes = model["tensors"]["consumed"]["decoder"]
        assert (graphs[role]["tensors"], graphs[role]["weight_bytes"]) == (sizes["tensors"], sizes["bytes"])
    (pixels,) = graphs["vision"]["inputs"]
    assert pixels == {"name": "pixel_values", "dtype": "float32", "dims": ["images", 3, 32, 32]}
    assert model["graphs"]["vision"]["inputs"][0]["dims"] == pixels["dims"]
    for key in ("flops", "model"):
        assert {**profile[key], "fingerprint": None} == {**model["profile"][key], "fingerprint": None}
    used = {*report["bundle"]["consumed_tensors"], *report["bundle"]["folded_tensors"]}
    assert used == set(load_file(llava / "model.safetensors")) - set(report["bundle"]["ignored_tensors"])
    assert report["bundle"]["weight_bytes"] == (llava / "model.safetensors").stat().st_size


def test_a_bundle_for_people(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(bundle)]) == 0
    out = capsys.readouterr().out
    size = Bundle(bundle).manifest.files["checkpoint/model.safetensors"].bytes
    for part in (
        "decoder, fused: dense.decoder.fused.onnx, 21 tensors, ",
        "past_key.0-1       float32 [1, 4, past_0, 16]",
        f"weights, once for all profiles: {size:,} bytes",
        "checkpoint tensors that no graph uses: 18\n   16  tower layer 2",
        "cache_key.0-1      float32 [1, 4, buffer_0, 16]",
    ):
        assert part in out
    assert out.count("in   input_ids") == 2  # the first two lowerings take and give the same


def test_the_model_in_a_bundle_is_a_model(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspected(capsys, bundle / "checkpoint")["model"]["exportable"]


def test_graphs_are_read_only_where_onnx_is(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (profile,) = inspected(capsys, toy)["profiles"]
    assert [graph["file"] for graph in profile["graphs"]] == ["vision.onnx", "toy.decoder.fused.onnx"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = inspected(capsys, toy)
    assert report["profiles"][0]["graphs"] is None and report["bundle"]["consumed_tensors"] is None
    assert main(["inspect", str(toy)]) == 0
    assert "graphs: not read, since onnx is not installed" in capsys.readouterr().out


def test_layers_that_are_alike_are_one_line() -> None:
    inputs = {"visual": ["visual", 8]} | {f"past_key.{n}": [1, f"past_{n // 3}"] for n in (0, 1, 2, 4, 5)}
    assert graph_table(values(inputs), values({"selected.0": [4]})).splitlines() == [
        "  in   visual        [visual, 8]",
        "  in   past_key.0-2  [1, past_0]",
        "  in   past_key.4-5  [1, past_1]",
        "  out  selected.0    [4]",
    ]


def test_profiles_are_checked_against_a_model(
    llava: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bundle), "--model", str(llava)]) == 0
    other = tiny_llava(tmp_path / "other", layers=3)
    capsys.readouterr()
    assert main(["inspect", str(bundle), "--model", str(other)]) == 2
    assert "model.fingerprint is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["MODEL", "--profile", "dense"], "--profile: "),
        (["MODEL", "--model", "x"], "is a model, not a bundle or a profile"),
        (["org/name", "--profile", "dense"], "--profile: org/name is a model"),
        (["BUNDLE", "--image-size", "8x8"], "--image-size: is for a model; a profile says itself"),
        (["BUNDLE", "--image-size", "8"], "'8' is not WIDTHxHEIGHT in pixels"),
    ],
)
def test_options_that_do_not_belong_together(
    arguments: list[str], said: str, llava: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(llava), "BUNDLE": str(toy)}
    assert main(["inspect", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert said in capsys.readouterr().err
