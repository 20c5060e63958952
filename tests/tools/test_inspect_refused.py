"""`trimvlm inspect` of models that export would refuse: all reasons at once, and whatever can be known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_llava

from trimvlm_tools.cli import main


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A model to break."""
    return tiny_llava(tmp_path / "broken")


def inspected(capsys: pytest.CaptureFixture[str], *arguments: Path | str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)["model"]


def rewrite(checkpoint: Path, without: str, more: dict[str, Any]) -> None:
    """Takes a tensor away and adds others."""
    file = checkpoint / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if not name.endswith(without)}
    save_file({**tensors, **more}, file)


def test_everything_that_is_wrong_is_found_at_once(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(
        broken,
        without="linear_1.bias",
        more={"adapter.weight": np.zeros((2, 3), np.float32), "numbers": np.zeros(5, np.int64)},
    )
    (broken / "chat_template.jinja").unlink()
    before = {file: file.stat().st_mtime_ns for file in broken.iterdir()}
    report = inspected(capsys, broken, code=1)
    assert not report["exportable"]
    assert list(report["tensors"]["missing"]) == ["model.multi_modal_projector.linear_1.bias"]
    assert report["tensors"]["unexpected"] == ["adapter.weight", "numbers"]
    problems = report["problems"]
    for part in (
        "I64 tensors are not supported, only float32, float16, bfloat16: numbers in model.safetensors",
        "no tensor for model.multi_modal_projector.linear_1.bias [64]",
        "not known to be unneeded: adapter.weight (the first of 2 tensors)",
        "no chat template",
    ):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert len(problems) == 4 and report["prompt"] is None
    assert report["profile"] is not None  # what can be known is still shown
    assert {file: file.stat().st_mtime_ns for file in broken.iterdir()} == before
    assert main(["inspect", str(broken)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "export refuses it: 4 problems"


def test_export_has_the_same_problem(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(broken, without="linear_1.bias", more={"linear_1.bias": np.zeros(63, np.float32)})
    (problem, _) = inspected(capsys, broken, code=1)["problems"]
    assert main(["export", str(broken), "--out", str(tmp_path / "out")]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"text_config": {"model_type": "gemma"}}, "text_config.model_type: 'gemma' is not supported"),
        ({"text_config": {"hidden_size": "wide"}}, "config.json cannot be used: Validation error"),
        ({"model_type": "blip"}, "model_type 'blip' is not supported; supported: "),
        ({"vision_config": {"image_size": 48}}, "but the vision tower takes 48 x 48"),
    ],
)
def test_configurations(
    change: dict[str, Any], part: str, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    report = inspected(capsys, broken, code=1)
    assert any(part in problem for problem in report["problems"]), report["problems"]
    assert report["stored"]["tensors"] == 98


def test_a_text_model_that_is_not_supported(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rest is known; which tensors are too many is not."""
    whole = inspected(capsys, broken)["tensors"]
    path = broken / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["model_type"] = "gemma"
    path.write_text(json.dumps(config))
    rewrite(broken, without="linear_1.bias", more={"adapter.weight": np.zeros((2, 3), np.float32)})
    report = inspected(capsys, broken, code=1)
    assert report["tensors"]["consumed"]["decoder"] is None and report["graphs"]["decoder"] is None
    assert report["tensors"]["consumed"]["vision"]["tensors"] == whole["consumed"]["vision"]["tensors"] - 1
    assert list(report["tensors"]["missing"]) == ["model.multi_modal_projector.linear_1.bias"]
    assert report["tensors"]["ignored"] == whole["ignored"] and report["tensors"]["unexpected"] == []
    assert main(["inspect", str(broken)]) == 1
    assert "export refuses it: 2 problems" in capsys.readouterr().out


def test_files(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (broken / "processor_config.json").unlink()
    unknown = {"image_processor_type": "ViTImageProcessor"}
    (broken / "preprocessor_config.json").write_text(json.dumps(unknown))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    report = inspected(capsys, broken, code=1)
    assert any("cut short" in problem for problem in report["problems"])
    assert any("ViTImageProcessor" in problem for problem in report["problems"])
    assert report["tensors"] is None and report["image"]["visual_tokens"] is None
    weights.rename(broken / "pytorch_model.bin")
    report = inspected(capsys, broken, code=1)
    assert any("only pickled weights here" in problem for problem in report["problems"])
    assert report["stored"] is None and report["text"]["layers"] == 4
    assert main(["inspect", str(broken)]) == 1
    assert "images: not known" in capsys.readouterr().out
