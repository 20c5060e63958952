"""`trimvlm fit`: what it prints and with what it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_library import two_profiles

from trimvlm_tools.cli import main

BOARD = """
name: my-board
device: a board
system: Linux
backend: tensorrt_rtx
versions: ">=1.7,<2"
lowering: fused
dtypes: [float32]
compute_capability: "8.9"
memory_gb: {memory}
{more}
limits: {{images: 1, text: 100, new_tokens: 50}}
source: made up
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return two_profiles(tmp_path / "bundle")


def board(path: Path, memory: float, more: str = "bandwidth_gb_s: 100") -> str:
    path.write_text(BOARD.format(memory=memory, more=more))
    return str(path)


def fit(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["fit", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_what_fits(bundle: Path, tmp_path: Path, capsys) -> None:
    target = board(tmp_path / "board.yaml", 1)
    code, said = fit(capsys, bundle, "--profile", "toy", "--target", target, "--text", 80, "--new-tokens", 50)
    assert code == 0
    lines = said.splitlines()
    assert lines[0] == "toy in float32 on my-board (a board): 1 images, 80 text rows, 50 new tokens"
    assert lines[1] == "predicted, not measured; nothing was ever run on this target"
    assert [line.split("  ")[0] for line in lines[4:11]] == [
        *("runtime and libraries", "vision engine", "decoder engine", "KV cache", "KV cache, second copy"),
        *("activations", "together"),
    ]
    assert "fits: " in said and "stay free" in said and "what would fit" not in said
    assert "ESTIMATED" in said and "never measured" in said
    assert "unknown: tflops: times count bytes alone" in said


def test_what_does_not_fit_exits_with_1_and_says_what_would(bundle: Path, tmp_path: Path, capsys) -> None:
    target = board(tmp_path / "board.yaml", 0.3)
    code, said = fit(capsys, bundle, "--profile", "toy", "--target", target, "--text", 80, "--new-tokens", 50)
    assert code == 1
    assert "does NOT fit\n  memory: " in said and "MiB too much for 0.3 GiB" in said
    assert "what would fit, each predicted:\n  --target rtx-" in said


def test_every_profile_of_a_bundle_as_json(bundle: Path, tmp_path: Path, capsys) -> None:
    target = board(tmp_path / "board.yaml", 0.3, more="")
    code, said = fit(capsys, bundle, "--target", target, "--text", 101, "--json")
    found = json.loads(said)
    assert code == 1 and [each["profile"] for each in found] == ["other", "toy"]
    for each in found:
        assert each["fits"] is False and each["left"] < 0
        assert each["memory"]["peak"] == sum(piece["bytes"] for piece in each["memory"]["pieces"])
        assert len(each["kv_layers"]) == 3 and each["kv_layers"][1] == 0
        assert [problem.partition(":")[0] for problem in each["problems"]] == ["memory", "text", "new_tokens"]
        assert each["times"]["basis"] == "estimated from the target's peak and bandwidth, never measured"
        assert each["times"]["first_token"] is None
        assert all(change["left"] >= 0 for change in each["changes"])


def test_a_target_without_memory_is_not_judged(bundle: Path, capsys) -> None:
    code, said = fit(capsys, bundle, "--profile", "toy")
    assert code == 0
    assert "whether that fits, the target does not say" in said
    assert "unknown: memory_gb: whether it fits" in said and "unknown: bandwidth_gb_s: no times" in said


def test_mistakes_are_one_line(bundle: Path, capsys) -> None:
    for arguments, words in (
        ((bundle, "--text", 0), "text: 0 is too small; give 1 or more"),
        ((bundle, "--profile", "none"), "no profile 'none'"),
        ((bundle, "--target", "rtx-4091"), "did you mean rtx-4090"),
        ((bundle / "nowhere",), "no manifest.json here"),
    ):
        assert main(["fit", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
