"""PAR: actions, preferences, layer sets against brute force; training that helps; what is written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import noise_image, tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.rules import RouterScores
from trimvlm.schedule import Schedule, resolve
from trimvlm.session import Session
from trimvlm_calib.calibrate import calibrate_all
from trimvlm_calib.calibrated import Calibrated, save_calibrated
from trimvlm_calib.distances import distance_of
from trimvlm_calib.files import load_profile
from trimvlm_calib.methods import par
from trimvlm_calib.outcome import Outcome, TrainedRouter, merge
from trimvlm_calib.probe import Probe
from trimvlm_calib.router_training import draw_actions, preference_loss, preferences, router_inputs
from trimvlm_calib.samples import Sample
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_export.reference import Reference
from trimvlm_export.router import Router
from trimvlm_export.router_graph import load_router

LAYERS, QUESTION = 6, "what is the color of w3 ?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("par") / "model", layers=LAYERS)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(checkpoint: Path) -> list[Sample]:
    found = []
    for number in range(6):
        path = checkpoint.parent / f"{number}.png"
        noise_image(number).save(path)
        found.append(Sample(image=path, question=QUESTION))
    return found


def actions(scores: np.ndarray, seed: int = 0, **changes: Any):
    settings = {"count": 5, "keep": 3, "noise": 4.0, "layers": 4, "skip": 2, **changes}
    return draw_actions(np.random.default_rng(seed), scores, **settings)


def test_actions_keep_and_leave_out_so_many() -> None:
    scores = np.array([0.1, 0.5, 0.2, 0.9, 0.0, 0.9, 0.3], np.float32)
    drawn = actions(scores)
    assert drawn.tokens.sum(axis=1).tolist() == [3] * 5
    assert drawn.layers.sum(axis=1).tolist() == [2] * 5
    for preference, tokens in zip(drawn.preference, drawn.tokens, strict=True):
        assert set(np.flatnonzero(tokens)) == set(np.argsort(-preference, kind="stable")[:3])
    assert len({tuple(row) for row in drawn.tokens.tolist()}) > 1
    for part, same, other in zip(
        (drawn.tokens, drawn.layers),
        (actions(scores).tokens, actions(scores).layers),
        (actions(scores, seed=1).tokens, actions(scores, seed=1).layers),
        strict=True,
    ):
        assert np.array_equal(part, same) and not np.array_equal(part, other)
    plain = actions(scores, noise=0.0).tokens
    assert [np.flatnonzero(row).tolist() for row in plain] == [[1, 3, 5]] * 5
    assert actions(scores, keep=7, skip=0).tokens.all() and actions(scores, keep=7, skip=0).layers.all()


def test_preferences_pair_every_better_action_with_every_worse_one() -> None:
    drawn = actions(np.arange(7.0))
    divergences = [0.3, 0.1, 0.9, 0.2, 0.5]  # the middle one, 0.3, takes no part
    tokens, layers = preferences(drawn, divergences)
    expected = [(better, worse) for better in (1, 3) for worse in (4, 2)]
    for row, (better, worse) in enumerate(expected):
        for found, kept in ((tokens, drawn.tokens), (layers, drawn.layers)):
            assert found[row].tolist() == (kept[better].astype(int) - kept[worse].astype(int)).tolist()
    assert len(tokens) == len(layers) == len(expected)


def test_loss_is_that_of_independent_choices() -> None:
    """Against log-probabilities of whole actions, in float64."""
    drawn, generator = actions(np.arange(7.0)), np.random.default_rng(3)
    scores = [generator.standard_normal(7), generator.standard_normal(4)]

    def log_probability(action: int) -> float:
        total = 0.0
        for odds, kept in zip(scores, (drawn.tokens[action], drawn.layers[action]), strict=True):
            chance = 1 / (1 + np.exp(-odds))
            total += np.log(np.where(kept, chance, 1 - chance)).sum()
        return total

    order = itertools.product((1, 3), (4, 2))
    margins = np.array([log_probability(better) - log_probability(worse) for better, worse in order])
    expected = np.log1p(np.exp(-0.5 * margins)).mean()
    pairs = preferences(drawn, [0.3, 0.1, 0.9, 0.2, 0.5])
    tensors = tuple(torch.from_numpy(part) for part in scores)
    assert float(preference_loss(tensors, pairs, 0.5)) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]


def test_layer_sets_against_all_sets() -> None:
    scores = np.random.default_rng(2).standard_normal((9, 4))
    found = par.layer_sets(scores, skip=2, count=3)
    every = list(itertools.combinations(range(4), 2))
    assert found[0] == min(every, key=lambda each: scores.mean(axis=0)[list(each)].sum())
    own = {min(every, key=lambda each: row[list(each)].sum()) for row in scores}
    for number in (1, 2):
        assert found[number] in own

        def kept(sets: list[tuple[int, ...]]) -> float:
            """Mean over samples of the best set's sum of executed layers."""
            return float(np.mean([max(row.sum() - row[list(each)].sum() for each in sets) for row in scores]))

        best = max(kept([*found[:number], each]) for each in own - set(found[:number]))
        assert kept(found[: number + 1]) == pytest.approx(best)
    with pytest.raises(UserError, match="variants: the samples ask for 1 different layer sets, not 2"):
        par.layer_sets(np.tile([3.0, 1.0, 2.0], (4, 1)), skip=1, count=2)


def test_training_helps_on_images_it_has_not_seen(checkpoint: Path, model: Any) -> None:
    """The loss falls, and the router's tokens diverge less than as many random ones, on held-out images."""
    spec, keep = model_spec(checkpoint), 4
    probe = Probe(model, spec, [tiny_inputs(checkpoint, QUESTION, seed=seed) for seed in range(100)])
    outcome = par.calibrate(probe, par.Parameters(what="tokens", keep=keep / 16))
    losses = outcome.curves["router_loss"]
    assert losses[0] == pytest.approx(np.log(2), abs=0.02) and losses[-1] < 0.95 * losses[0]
    assert outcome.router is not None and outcome.decisions.select[0].by == RouterScores()
    router = Router(outcome.router.named("x"), spec.hidden, spec.layers).requires_grad_(False)
    router.load_state_dict({name: torch.from_numpy(part) for name, part in outcome.router.weights.items()})
    generator = np.random.default_rng(0)
    ours, random = [], []
    for seed in range(1000, 1040):
        inputs = tiny_inputs(checkpoint, QUESTION, seed=seed)
        with Reference(model, resolve(Decisions(), spec)) as dense:
            features = dense.features(inputs)
            full = dense.prefill(inputs, features=features)
        learned = router(*router_inputs(model, inputs, features))[0].numpy()
        divergences = []
        for scores in (learned, *generator.random((3, 16), np.float32)):
            with Reference(model, resolve(outcome.decisions, spec)) as reference:
                run = reference.prefill(
                    inputs, features=features, router_scores=scores, resume=(2, full.hidden[2]), detail=False
                )
            divergences.append(distance_of(full.logits, run.logits, "full||pruned"))
        ours.append(divergences[0])
        random += divergences[1:]
    assert np.mean(ours) < 0.93 * np.mean(random)


def made(checkpoint: Path, samples: list[Sample], name: str = "par", **parameters: Any) -> Calibrated:
    """Few actions, and trained by heart: scores far apart."""
    settings = {"actions": 6, "passes": 12, "rate": 0.003, **parameters}
    return calibrate_all(checkpoint, "par", samples, settings, data_name="noise", name=name)


def test_calibrated_exported_and_run_is_what_the_reference_computes(
    tmp_path: Path, checkpoint: Path, model: Any, samples: list[Sample]
) -> None:
    (file,) = save_calibrated(made(checkpoint, samples), tmp_path / "par.yaml")
    profile = load_profile(file)
    assert profile.router is not None and profile.router.weights == "par.router.safetensors"
    assert profile.calibration is not None
    means = profile.calibration.curves["layer_score"]
    assert means[:3] == (None,) * 3
    fixed = min(range(3, LAYERS), key=lambda layer: means[layer] or 0.0)
    assert profile.decisions.layers == (LayerRule(layers=(fixed,), execute="none"),)

    bundle = export(checkpoint, profile, tmp_path / "bundle", beside=tmp_path)
    router = load_router(profile, tmp_path / profile.router.weights)
    with (
        Session.open(bundle) as session,
        Reference(model, Schedule.resolve(profile, profile.model)) as reference,
    ):
        for seed in range(20, 24):
            inputs = tiny_inputs(checkpoint, QUESTION, seed=seed)
            features, picture = reference.features(inputs), noise_image(seed * 100)
            scores = router(*router_inputs(model, inputs, features))[0].numpy()
            expected = reference.prefill(inputs, features=features, router_scores=scores)
            outputs = session.prefill(session.prompt(QUESTION, 1), session.vision([picture]))
            assert outputs["selected.0"].tolist() == expected.selected[0].tolist()
            np.testing.assert_allclose(outputs["logits"][0], expected.logits, atol=1e-4)
            ids = reference.generate(inputs, 4, features=features, router_scores=scores)
            answer = "".join(session.generate(QUESTION, [picture], max_new_tokens=4)).split()
            assert answer == [session._tokenizer.id_to_token(token) for token in ids if token > 4]


def test_two_runs_give_the_same_bytes(tmp_path: Path, checkpoint: Path, samples: list[Sample]) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_calibrated(made(checkpoint, samples[:4], actions=3), tmp_path / folder / "par.yaml")
    for name in ("par.yaml", "par.router.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    (tmp_path / "a" / "par.router.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"router weights .*a/par.router.safetensors are missing") as caught:
        load_profile(tmp_path / "a" / "par.yaml")
    assert "\n" not in str(caught.value)
    (tmp_path / "moved.safetensors").write_bytes(b"other")
    (tmp_path / "moved.safetensors").rename(tmp_path / "a" / "par.router.safetensors")
    with pytest.raises(UserError, match="is not its router"):
        load_profile(tmp_path / "a" / "par.yaml")


def test_fixed_layers_need_no_router(checkpoint: Path, samples: list[Sample]) -> None:
    outcome = made(checkpoint, samples[:2], what="layers", passes=1)
    assert outcome.router is None
    (profile,) = outcome.profiles
    assert profile.router is None and profile.decisions.select == ()
    assert [len(rule.layers) for rule in profile.decisions.layers] == [1]


def test_variants_unite_with_what_another_method_decides() -> None:
    layers = [Decisions(layers=(LayerRule(layers=(layer,), execute="none"),)) for layer in (3, 5)]
    router = TrainedRouter(width=8, heads=1, first=3, mask="full", weights={"x": np.ones(3, np.float32)})
    trained = Outcome(decisions=layers[0], variants=tuple(layers), router=router)
    blind = LayerRule(layers=(1,), query="none")
    whole = merge({"v-skip": Outcome(decisions=Decisions(layers=(blind,))), "par": trained})
    assert [each.layers for each in whole.variants] == [(blind, *each.layers) for each in layers]
    assert whole.router is router and whole.decisions == whole.variants[0]


def test_variants_are_written_side_by_side(
    tmp_path: Path, checkpoint: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small a training may ask for one set only.
    monkeypatch.setattr(par, "layer_sets", lambda scores, skip, count: [(0,), (2,)])
    files = save_calibrated(
        made(checkpoint, samples[:2], "mine", passes=1, variants=2, what="layers"), tmp_path / "mine.yaml"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine-0.yaml", "mine-1.yaml", "mine.router.safetensors",
    ]  # fmt: skip
    profiles = [load_profile(file) for file in files]
    assert [(profile.name, profile.choice) for profile in profiles] == [
        ("mine-0", "mine"),
        ("mine-1", "mine"),
    ]
    assert [profile.decisions.layers[0].layers for profile in profiles] == [(3,), (5,)]
    assert profiles[0].router == profiles[1].router


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.0}, "keep: 0.0 is not within 0"),
        ({"actions": 1}, "actions: 1 is less than 2"),
        ({"what": "tokens", "variants": 2}, "variants: they differ in their layers"),
        ({"rate": 0.0}, "noise, rate, beta: positive numbers"),
        ({"skip": 0.5}, "skip: 3 layers cannot be chosen among the last 3"),
        ({"layer": 6}, "layer: 6 is not within 0..5"),
        ({"width": 7}, "router.width: 7 does not make 1 heads of an even number"),
    ],
)
def test_parameters_that_cannot_be(
    checkpoint: Path, samples: list[Sample], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(checkpoint, samples[:1], **parameters)
