"""The parity gate: what passes, what fails, what is only ambiguous; end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import noise_image, tiny_llava

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.parity import Metric, ParityReport, Rung
from trimvlm.profile import Decisions, Method, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm_calib.samples import load_samples
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_tools.cli import main
from trimvlm_tools.parity.check import check
from trimvlm_tools.parity.compare import LIMITS, Answer, Worst, kl, score_gap
from trimvlm_tools.parity.goldens import check_goldens


def answer(**changes: object) -> Answer:
    rng = np.random.default_rng(0)
    base = Answer(
        visual=rng.normal(size=(4, 3)),
        selected=[np.array([0, 2])],
        scores=[np.array([0.4, 0.1, 0.3, 0.2])],
        logits=rng.normal(size=(2, 5)),
        kv=[(rng.normal(size=(1, 1, 6, 2)), rng.normal(size=(1, 1, 6, 2)))],
        tokens=[1, 2],
    )
    return replace(base, **changes)


def verdicts(ours: Answer, theirs: Answer) -> dict[str, str | None]:
    worst = Worst(LIMITS["float32"])
    worst.add(ours, theirs)
    return {metric.name: metric.verdict for metric in worst.metrics()}


def test_equal_answers_pass() -> None:
    assert set(verdicts(answer(), answer()).values()) == {"PASS", None}


@pytest.mark.parametrize(
    ("changes", "metric"),
    [
        ({"logits": answer().logits + 2e-4}, "logits max abs"),
        ({"logits": np.full((2, 5), np.nan)}, "logits max abs"),
        ({"tokens": [1, 3]}, "answers with other tokens"),
        ({"visual": answer().visual + 1e-3}, "vision features max abs"),
        ({"kv": [(answer().kv[0][0], answer().kv[0][1] + 1e-3)]}, "KV max abs"),
        ({"kv": [(answer().kv[0][0][:, :, :5], answer().kv[0][1])]}, "KV max abs"),
        ({"selected": [np.array([0, 3])]}, "answers with other selections"),
    ],
)
def test_each_gate_can_fail(changes: dict, metric: str) -> None:
    found = verdicts(answer(**changes), answer())
    assert found[metric] == "FAIL"


def test_another_selection_within_the_margin_is_ambiguous_not_a_pass() -> None:
    tied = answer(scores=[np.array([0.4, 0.1, 0.3, 0.3 - 1e-9])])
    found = verdicts(replace(tied, selected=[np.array([0, 3])], tokens=[1, 4]), tied)
    assert found["answers with other selections"] == "AMBIGUOUS"
    assert found["answers with other tokens"] == "AMBIGUOUS"


def test_kl_and_gap_by_hand() -> None:
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    by_hand = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert kl(np.log(p)[None], np.log(q)[None]) == pytest.approx(by_hand)
    assert score_gap(np.array([0.1, 0.7, 0.4]), 2) == pytest.approx(0.3)
    assert score_gap(np.array([0.1, 0.7]), 2) == np.inf


def test_nothing_measured_is_not_a_pass() -> None:
    unmeasured = Rung(name="a", metrics=(Metric(name="m", value=None, limit=1.0),))
    skipped = Rung(name="b", skipped="no device")
    report = ParityReport(profile="p", dtype="float32", samples=1, data="d", versions={}, rungs=(skipped,))
    assert (unmeasured.verdict, skipped.verdict, report.verdict) == ("SKIPPED", "SKIPPED", "SKIPPED")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with one selecting profile, and a folder of samples."""
    root = tmp_path_factory.mktemp("parity")
    checkpoint = tiny_llava(root / "model")
    own = LastRowAttention(attention="own")
    profile = Profile(
        name="half",
        method=Method(name="by hand"),
        model=model_spec(checkpoint),
        decisions=Decisions(select=(Select(layer=1, keep=8, by=own),)),
    )
    data = root / "data"
    data.mkdir()
    lines = []
    for number in range(3):
        noise_image(number).save(data / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"where is w{number} ?"}))
    (data / "questions.jsonl").write_text("\n".join(lines))
    return export(checkpoint, profile, root / "bundle"), data


def test_ladder_and_goldens(tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle, data = tiny
    with pytest.raises(UserError, match="--write-goldens"):
        check_goldens(Bundle(bundle), None)
    assert (
        main(["check", str(bundle), "--data", str(data), "--samples", "3", "--write-goldens", "--json"]) == 0
    )
    (report,) = json.loads(capsys.readouterr().out)
    rungs = {rung["name"]: rung for rung in report["rungs"]}
    free = {
        metric["name"]: metric["value"] for metric in rungs["reference -> graph, free running"]["metrics"]
    }
    assert free["answers with other selections"] == 0
    assert free["logits max abs"] <= 1e-4
    assert rungs["graph -> engine"]["skipped"]
    assert main(["check", str(bundle), "--goldens"]) == 0
    assert "reference (goldens) -> ort-cpu" in capsys.readouterr().out


def test_a_graph_with_other_weights_fails_the_gate(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The gate must notice: a graph in which two matrices of one layer changed places."""
    bundle, data = tiny
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    questions = load_samples(data)[:1]
    assert check(Bundle(damaged), None, questions, data="tiny").verdict == "PASS"
    graph = damaged / Bundle(damaged).manifest.profiles["half"].decoders["fused"]
    model = onnx.load(graph, load_external_data=False)
    swap = {"layers.0.mlp.gate_proj.weight": "layers.0.mlp.up_proj.weight"}
    swap |= {new: old for old, new in swap.items()}
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]
    onnx.save(model, graph)
    assert check(Bundle(damaged), None, questions, data="tiny").verdict == "FAIL"
