"""The parity gate: what passes, what fails, what is only ambiguous; end to end on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from tiny_models import noise_image, tiny_llava
from tiny_router import random_router

from trimvlm.bundle import Bundle, record, write_manifest
from trimvlm.encoder_rules import EncoderStage, VisPruner
from trimvlm.errors import UserError
from trimvlm.manifest import read_manifest
from trimvlm.opening import on_cpu
from trimvlm.parity import Metric, ParityReport, Rung
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, RouterScores, ValueInfluence
from trimvlm_calib.samples import load_samples
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_tools.cli import main
from trimvlm_tools.parity.answer import Answer
from trimvlm_tools.parity.check import check
from trimvlm_tools.parity.choices import choices, score_gap
from trimvlm_tools.parity.compare import LIMITS, Worst, kl
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
        ({"kv": [(answer().kv[0][0], answer().kv[0][1] + 1e-3)]}, "KV max abs, of the largest"),
        ({"kv": [(answer().kv[0][0][:, :, :5], answer().kv[0][1])]}, "KV max abs, of the largest"),
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


def test_a_later_choice_that_follows_from_a_tie_is_not_counted_against_it() -> None:
    scores = [np.array([0.4, 0.1, 0.3, 0.3 - 1e-9]), np.array([0.9, 0.1])]
    theirs = answer(selected=[np.array([0, 2]), np.array([0])], scores=scores)
    ours = replace(theirs, selected=[np.array([0, 3]), np.array([3])])
    assert verdicts(ours, theirs)["answers with other selections"] == "AMBIGUOUS"
    assert (
        verdicts(replace(ours, selected=[np.array([0, 2]), np.array([2])]), theirs)[
            "answers with other selections"
        ]
        == "FAIL"
    )


def test_a_tie_in_one_answer_excuses_no_other_answer() -> None:
    tied = answer(scores=[np.array([0.4, 0.1, 0.3, 0.3 - 1e-9])])
    worst = Worst(LIMITS["float32"])
    worst.add(replace(tied, selected=[np.array([0, 3])], tokens=[1, 4]), tied)
    worst.add(answer(logits=answer().logits + 1), answer())
    found = {metric.name: metric.verdict for metric in worst.metrics()}
    assert found["answers with other selections"] == found["answers with other tokens"] == "AMBIGUOUS"
    assert found["logits max abs"] == "FAIL"


SKIPPING = answer(
    skipped=[np.array([1]), np.array([1, 2])],
    skip_scores=[np.array([0.1, 0.9, 0.2, 0.3]), np.array([0.3, 0.1, 0.7, 0.7 - 1e-9])],
    selected=[],
    scores=[],
)
MASKED = answer(visible={0: np.array([True, False, True, True])}, scores=[np.array([0.4, 0.1, 0.3, 0.2])])


@pytest.mark.parametrize(
    ("theirs", "changes", "metric", "verdict"),
    [
        (answer(patches=[np.arange(4)]), {"patches": [np.array([0, 1, 2, 5])]}, "patches", "FAIL"),
        (
            answer(patches=[np.arange(4)], patches_tie=True),
            {"patches": [np.array([0, 1, 2, 5])], "visual": answer().visual + 9},
            "patches",
            "AMBIGUOUS",
        ),
        (SKIPPING, {"skipped": [np.array([3]), np.array([2, 3])]}, "rows in skip mode", "FAIL"),
        (SKIPPING, {"skipped": [np.array([1]), np.array([1, 3])]}, "rows in skip mode", "AMBIGUOUS"),
        (MASKED, {"visible": {0: np.array([True, True, True, True])}}, "rows below a threshold", "FAIL"),
        (
            replace(MASKED, scores=[np.array([0.4, 0.1, 0.25 + 1e-9, 0.2])]),
            {"visible": {0: np.array([True, True, True, True])}},
            "rows below a threshold",
            "AMBIGUOUS",
        ),
    ],
)
def test_each_kind_of_choice_is_compared(theirs: Answer, changes: dict, metric: str, verdict: str) -> None:
    """Rows that skip already rank no more; the threshold here is 0.25."""

    def found(ours: Answer) -> str | None:
        worst = Worst(LIMITS["float32"], {0: 0.25} if theirs.visible else {})
        worst.add(ours, theirs)
        return {each.name: each.verdict for each in worst.metrics()}[f"answers with other {metric}"]

    assert found(theirs) == "PASS"
    assert found(replace(theirs, **changes)) == verdict


def test_gaps_by_hand() -> None:
    gaps = {name: choice.gap for name, choice in choices(SKIPPING, {}).items()}
    assert gaps == pytest.approx({"skipped.0": 0.6, "skipped.1": 1e-9})
    later = answer(
        visual=np.zeros((6, 1)),
        selected=[np.array([1, 3, 5]), np.array([3, 5])],
        scores=[np.array([0.0, 0.8, 0.1, 0.6, 0.2, 0.5]), np.array([0.1, 0.3, 0.9])],
        visible={0: np.array([True, True, False])},
    )
    gaps = {name: choice.gap for name, choice in choices(later, {0: 0.55}).items()}
    # Survivors' scores are 0.8, 0.6 and 0.5: the threshold is 0.05 away, nearer than the second cut.
    assert gaps == pytest.approx({"selected.0": 0.3, "present_visible.0": 0.05, "selected.1": 0.05})


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


OWN = LastRowAttention(attention="own")
PROFILES = {
    "patches": Decisions(
        encoder=EncoderStage(keep=9, by=VisPruner(attention=1, features=2)),
        select=(Select(layer=1, keep=6, by=OWN), Select(layer=2, keep=4, by=RouterScores())),
    ),
    "rows": Decisions(
        select=(Select(layer=1, keep=12, by=ValueInfluence(threshold=0.15)),),
        skip=SkipMode(stages=(SkipStage(layer=2, count=4), SkipStage(layer=3, count=9))),
        layers=(LayerRule(layers=(2, 3), query="unskipped"), LayerRule(layers=(0,), sublayers="attention")),
    ),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with profiles that choose in every way, and a folder of samples."""
    root = tmp_path_factory.mktemp("parity")
    checkpoint = tiny_llava(root / "model")
    spec = model_spec(checkpoint)
    router = random_router(root, spec)
    for name, decisions in PROFILES.items():
        profile = Profile(
            name=name,
            method=Method(name="by hand"),
            model=spec,
            decisions=decisions,
            router=router if name == "patches" else None,
        )
        export(checkpoint, profile, root / "bundle", beside=root)
    data = root / "data"
    data.mkdir()
    lines = []
    for number in range(3):
        noise_image(number).save(data / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"where is w{number} ?"}))
    (data / "questions.jsonl").write_text("\n".join(lines))
    return root / "bundle", data


def test_ladder_and_goldens(tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle, data = tiny
    with pytest.raises(UserError, match="--write-goldens"):
        check_goldens(Bundle(bundle), "rows")
    command = ["check", str(bundle), "--data", str(data), "--samples", "3", "--write-goldens", "--json"]
    assert main(command) == 0
    reports = {report["profile"]: report for report in json.loads(capsys.readouterr().out)}
    wanted = {
        "patches": ("patches", "selections"),
        "rows": ("selections", "rows below a threshold", "rows in skip mode"),
    }
    assert set(reports) == set(wanted)
    for name, kinds in wanted.items():
        rungs = {rung["name"]: rung for rung in reports[name]["rungs"]}
        assert rungs["graph -> engine"]["skipped"]
        for rung in ("reference -> graph, free running", "reference -> graph, forced indices"):
            found = {metric["name"]: metric["value"] for metric in rungs[rung]["metrics"]}
            assert [found[f"answers with other {kind}"] for kind in kinds] == [0] * len(kinds)
            assert found["logits max abs"] <= 1e-4
    assert main(["check", str(bundle), "--goldens"]) == 0
    assert "reference (goldens) -> ort-cpu" in capsys.readouterr().out


def test_goldens_of_another_choice_fail(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """Every kind of choice that goldens keep is compared."""
    bundle, data = tiny
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    for profile, kind in (
        ("patches", "patches.0"),
        ("patches", "selected.1"),
        ("rows", "present_visible.0"),
        ("rows", "skipped.1"),
    ):
        check(Bundle(copy), profile, load_samples(data)[:1], data="tiny", goldens=1)
        file = copy / f"{profile}.goldens.json"
        goldens = json.loads(file.read_text())
        assert check_goldens(Bundle(copy), profile).verdict == "PASS"
        goldens["cases"][0]["choices"][kind]["rows"][0] += 1
        file.write_text(json.dumps(goldens))
        refresh(copy, file.name)
        assert check_goldens(Bundle(copy), profile).verdict == "FAIL"
        file.write_text(file.read_text().replace('"schema": 2', '"schema": 1'))
        refresh(copy, file.name)
        with pytest.raises(UserError, match="another version of trimvlm"):
            check_goldens(Bundle(copy), profile)


def refresh(bundle: Path, name: str) -> None:
    """Records a file of the bundle again, as it is now."""
    manifest = read_manifest(bundle)
    files = {**manifest.files, name: record(bundle / name)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))


def test_a_graph_with_other_weights_fails_the_gate(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """The gate must notice: a graph in which two matrices of one layer changed places."""
    bundle, data = tiny
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    questions = load_samples(data)[:1]
    assert check(Bundle(damaged), "patches", questions, data="tiny").verdict == "PASS"
    entry = Bundle(damaged).manifest.profiles["patches"]
    graph = damaged / entry.decoders[on_cpu(entry)]
    model = onnx.load(graph, load_external_data=False)
    swap = {"layers.0.mlp.gate_proj.weight": "layers.0.mlp.up_proj.weight"}
    swap |= {new: old for old, new in swap.items()}
    for node in model.graph.node:
        node.input[:] = [swap.get(name, name) for name in node.input]
    onnx.save(model, graph)
    refresh(damaged, graph.name)
    assert check(Bundle(damaged), "patches", questions, data="tiny").verdict == "FAIL"
