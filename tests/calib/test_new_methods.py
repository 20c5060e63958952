"""Decoder-side methods: what each measures, against a literal computation, and what it decides from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.accounting import macv
from trimvlm.encoder_rules import EncoderStage, MsvPrune
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, RandomOrder, TextAttention, ValueInfluence
from trimvlm.schedule import resolve
from trimvlm_calib import shipped
from trimvlm_calib.calibrate import read_parameters
from trimvlm_calib.influence import influence, visual_influence
from trimvlm_calib.methods import asl_skip, find, fitprune, magnitude, shortgpt, visipruner
from trimvlm_calib.outcome import Outcome, merge
from trimvlm_calib.probe import Probe
from trimvlm_export.checkpoint import model_spec

DEPTH, TOKENS = 8, 16
NEW = {
    "asl-skip": {},
    "visipruner": {},
    "pyramiddrop": {},
    "sparsevlm": {},
    "fitprune": {},
    "shortgpt": {},
    "magnitude": {},
    "random-layers": {},
    "random-select": {},
}
VARIANTS = [
    *NEW.items(),
    ("asl-skip", {"form": "offline", "share": 0.5, "target": "normalised"}),
    ("asl-skip", {"skipped": [0.25, 0.5, 0.75], "entropy": False}),
    ("visipruner", {"merge": False, "mask": "additive", "visual_attention": False, "shallow_cache": "none"}),
    ("visipruner", {"threshold": 0.0, "target": 0.5, "consecutive": True, "exit_cosine": 0.5}),
    ("pyramiddrop", {"positions": "persistent", "layers": [0.5], "keep": [0.25]}),
    ("sparsevlm", {"tokens": 64}),
    ("shortgpt", {"generation": True}),
    ("magnitude", {"norm": "l2", "share": 0.75}),
]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("methods"), layers=DEPTH, kv_heads=2, seed=3)
    model = LlavaForConditionalGeneration.from_pretrained(
        path, dtype="float32", attn_implementation="eager"
    ).eval()
    return model, model_spec(path), [tiny_inputs(path, f"what is w{n} ?", seed=n) for n in range(3)]


def probe_of(case) -> Probe:
    return Probe(*case)


def calibrated(name: str, probe: Probe, parameters: dict) -> Outcome:
    (method,) = find(name).values()
    return method.calibrate(probe, read_parameters({name: method}, parameters)[name])


def visual_of(model, inputs) -> np.ndarray:
    return np.flatnonzero(inputs["input_ids"][0].numpy() == model.config.image_token_id)


@pytest.mark.parametrize(("name", "parameters"), VARIANTS)
def test_every_method_resolves_and_is_deterministic(case, name, parameters):
    first, again = (calibrated(name, probe_of(case), parameters) for _ in range(2))
    assert first == again
    schedule = resolve(first.decisions, case[1])
    assert schedule != resolve(Decisions(), case[1])
    assert {len(curve) for curve in first.curves.values()} <= {DEPTH}


# -- what is measured


@torch.no_grad()
def test_contribution_is_kl_when_visual_rows_bypass_a_sublayer(case):
    """Literally: zero the visual rows of one sub-layer's output by a hook on the plain model."""
    model, _, samples = case
    outcome = calibrated("asl-skip", probe_of(case), {"form": "offline"})
    full = [model(**each).logits[0, -1].double().log_softmax(0) for each in samples]
    for kind, layer in (("attention", 1), ("ffn", 4)):
        divergences = []
        for inputs, p in zip(samples, full, strict=True):
            visual = torch.from_numpy(visual_of(model, inputs))

            def zero(module, args, output, visual=visual, kind=kind):
                (output[0] if kind == "attention" else output)[0, visual] = 0

            block = model.model.language_model.layers[layer]
            hook = (block.self_attn if kind == "attention" else block.mlp).register_forward_hook(zero)
            q = model(**inputs).logits[0, -1].double().log_softmax(0)
            hook.remove()
            divergences.append(float((p.exp() * (p - q)).sum()))
        assert outcome.curves[f"slc_{kind}"][layer] == pytest.approx(np.mean(divergences), rel=1e-3)


def test_targets_and_normalisation():
    slc = {"attention": (0.4, 0.2, 0.1, 0.0), "ffn": (0.3, 0.9, 0.1, 0.5)}
    assert asl_skip.choose_targets(slc, "raw") == ["ffn", "attention", "attention", "attention"]
    # equation 5: attention 0, .5, .75, 1; ffn .75, 0, 1, .5
    np.testing.assert_allclose(asl_skip.normalised(slc["attention"]), [0, 0.5, 0.75, 1])
    np.testing.assert_allclose(asl_skip.normalised(slc["ffn"]), [0.75, 0, 1, 0.5])
    assert asl_skip.choose_targets(slc, "normalised") == ["ffn", "attention", "ffn", "attention"]


@pytest.mark.parametrize(("entropy", "correlation"), [(True, True), (True, False), (False, True)])
def test_token_scores_are_equation_4(entropy, correlation):
    generator = np.random.default_rng(1)
    hidden, unembed = generator.normal(size=(9, 6)), generator.normal(size=(20, 6))
    visual, text = [2, 3, 4, 5], [0, 1, 6, 7, 8]
    entropies, cosines = [], []
    for row in visual:
        p = np.exp(hidden[row] @ unembed.T)
        p /= p.sum()
        entropies.append(-(p * np.log(p)).sum())
        mean = hidden[text].mean(0)
        cosines.append(hidden[row] @ mean / np.sqrt((hidden[row] @ hidden[row]) * (mean @ mean)))
    wanted = []
    for e, c in zip(entropies, cosines, strict=True):
        r = (e - min(entropies)) / (max(entropies) - min(entropies)) if entropy else 0
        r += (c - min(cosines)) / (max(cosines) - min(cosines)) if correlation else 0
        wanted.append(max(0, 1 - r))
    got = asl_skip.token_scores(
        hidden,
        np.array(visual),
        torch.from_numpy(unembed),
        entropy=entropy,
        correlation=correlation,
    )
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@torch.no_grad()
def test_tokens_in_skip_mode_by_the_published_loop(case):
    """Token by token and layer by layer, on the plain model's hidden states."""
    model, _, samples = case
    outcome = calibrated("asl-skip", probe_of(case), {"threshold": 17.0, "quantile": 1.0})
    slc = {kind: outcome.curves[f"slc_{kind}"] for kind in ("attention", "ffn")}
    counts = np.zeros((len(samples), DEPTH // 2))
    for number, inputs in enumerate(samples):
        visual, hidden = visual_of(model, inputs), model(**inputs, output_hidden_states=True).hidden_states
        accumulator = dict.fromkeys(visual, 0.0)
        for layer in range(DEPTH // 2):
            scores = asl_skip.token_scores(
                hidden[layer][0].numpy(), visual, model.lm_head.weight, entropy=True, correlation=True
            )
            kind = "attention" if slc["attention"][layer] <= slc["ffn"][layer] else "ffn"
            worth = 1 - (slc[kind][layer] - min(slc[kind])) / (max(slc[kind]) - min(slc[kind]))
            for token, score in zip(visual, scores, strict=True):
                accumulator[token] += 3 * score + 1 * worth
                counts[number, layer] += accumulator[token] >= 17 * DEPTH / 32
    assert outcome.curves["tokens_skipping"][: DEPTH // 2] == tuple(counts.max(axis=0))
    assert counts.max() > 0
    stages = outcome.decisions.skip.stages
    assert [stage.count for stage in stages] == sorted({stage.count for stage in stages})
    for rule in outcome.decisions.layers:
        assert min(rule.layers) >= stages[0].layer and "unskipped" in (rule.query, rule.ffn)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_influence_is_that_of_zeroing_one_weight_column(groups):
    """The literal definition, float64: drop key j's weights, recompute O, compare."""
    generator = np.random.default_rng(groups)
    weights = generator.random((4, 11))
    weights[:, 3] = 0  # a key that nobody looks at
    weights /= weights.sum(1, keepdims=True)
    values = generator.normal(size=(groups, 11, 5)) * 3
    each_head = np.repeat(values, 4 // groups, axis=0)
    output = (weights[:, :, None] * each_head).sum(1).ravel()
    cosines, norms = influence(weights, values, 8)
    for j in range(8):
        less = weights.copy()
        less[:, j] = 0
        rest = (less[:, :, None] * each_head).sum(1).ravel()
        cosine = output @ rest / np.sqrt((output @ output) * (rest @ rest))
        assert cosines[j] == pytest.approx(cosine, abs=1e-12)
        assert norms[j] == pytest.approx(np.linalg.norm(output - rest), abs=1e-12)
    assert cosines[3] == pytest.approx(1) and norms[3] == 0


def test_influence_where_nothing_is_left():
    alone = np.array([[1.0, 0.0]]), np.array([[[2.0], [5.0]]])
    np.testing.assert_array_equal(influence(*alone, 2)[0], [0, 1])
    np.testing.assert_array_equal(influence(np.zeros((1, 2)), alone[1], 2)[0], [1, 1])


@torch.no_grad()
def test_visual_influence_of_the_plain_model(case):
    """Against what the output projection is given: O from a hook, O - c_j by zeroing one value row."""
    model, _, samples = case
    inputs, layer = samples[0], 3
    block = model.model.language_model.layers[layer].self_attn
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        block.v_proj.register_forward_hook(lambda m, a, out: seen.update(v=out[0])),
        block.o_proj.register_forward_pre_hook(lambda m, args: seen.update(o=args[0][0, -1])),
        block.register_forward_hook(lambda m, a, out: seen.update(w=out[1][0, :, -1])),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    heads, size = len(seen["w"]), len(seen["o"]) // len(seen["w"])
    values = seen["v"].reshape(len(seen["v"]), -1, size).repeat_interleave(heads // 2, dim=1)  # [S, H, C]
    run = next(probe_of(case).runs(Decisions(), "", detail=True))
    visual = visual_of(model, inputs)
    cosines, norms = visual_influence(run, layer, visual)
    for place, row in enumerate(visual):
        moved = (seen["w"][:, row, None] * values[row]).reshape(-1)
        wanted = torch.cosine_similarity(seen["o"].double(), (seen["o"] - moved).double(), dim=0)
        assert cosines[place] == pytest.approx(float(wanted), abs=1e-5)
        assert norms[place] == pytest.approx(float(moved.norm()), rel=1e-4)


def test_visipruner_decides_by_its_detector(case):
    """Filter layer, threshold, budget and overflow from the samples' own figures, one by one."""
    _, spec, _ = case
    parameters = {"target": 3 / 16, "keep_quantile": 0.0}
    outcome = calibrated("visipruner", probe_of(case), parameters)
    (select,) = outcome.decisions.select
    blind = Decisions(
        layers=(
            LayerRule(layers=(0,), text_keys="sink", visual_keys="none"),
            LayerRule(layers=(1,), text_keys="none"),
        ),
        mask="post_softmax",
    )
    assert outcome.decisions.layers == blind.layers  # 6 of 32 layers: 2 of 8 (1.5, rounded)
    probe = probe_of(case)
    figures = [
        {layer: visual_influence(run, layer, probe.visual_rows(inputs)) for layer in range(spec.layers)}
        for run, inputs in zip(probe.runs(blind, "", detail=True), probe.inputs, strict=True)
    ]
    firsts = [min(layer for layer in range(3, 7) if (each[layer][0] < 0.995).any()) for each in figures]
    filter_ = max(firsts)  # the 0.9 quantile of three
    assert select.layer == filter_ + 1
    norms = [sorted(each[filter_][1], reverse=True) for each in figures]
    threshold = sorted((each[2] + each[3]) / 2 for each in norms)[1]  # the median sample keeps three
    assert isinstance(select.by, ValueInfluence)
    assert select.by.threshold == pytest.approx(threshold, rel=1e-5)
    counts = sorted(sum(norm > select.by.threshold for norm in each) for each in norms)
    assert counts[0] < counts[2] and select.keep == max(1, counts[0])
    assert outcome.curves["overflow"][filter_] == pytest.approx(
        sum(c > counts[0] for c in counts) / 3, rel=1e-5
    )
    assert outcome.curves["filter_samples"][filter_] == firsts.count(filter_)


def test_visipruner_threshold_lies_between_norms():
    norms = np.array([[1.0, 5.0, 3.0], [2.0, 6.0, 5.0], [9.0, 8.0, 1.0], [9.0, 9.0, 9.0]])
    assert visipruner.gap_after(norms, 1) == 5.5  # halfway: 4, 5.5, 8.5, 9
    assert visipruner.gap_after(norms, 3) == 0.5  # halfway to zero: .5, 1, .5, 4.5


def test_visipruner_exit_counts_in_total_or_in_a_row():
    moved = {5: False, 6: True, 7: False, 8: False, 9: True}
    assert visipruner.exit_layer(moved, 2, False, 12) == 8
    assert visipruner.exit_layer(moved, 2, True, 12) == 9
    assert visipruner.exit_layer(moved, 4, False, 12) == 12


@torch.no_grad()
def test_block_influence_is_one_minus_cosine(case):
    model, _, samples = case
    got = shortgpt.block_influence(probe_of(case))
    per_row: list[list[float]] = [[] for _ in range(DEPTH - 1)]  # the plain model's last state is normed
    for inputs in samples:
        states = [state[0].double() for state in model(**inputs, output_hidden_states=True).hidden_states]
        for layer in range(DEPTH - 1):
            for a, b in zip(states[layer], states[layer + 1], strict=True):
                per_row[layer].append(1 - float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()))
    np.testing.assert_allclose(got[:-1], np.mean(per_row, axis=1), rtol=1e-4)
    removed = calibrated("shortgpt", probe_of(case), {"share": 0.25}).decisions.layers[0].layers
    assert set(removed) == set(np.argsort(got)[:2])


def test_magnitude_norms_and_whole_layers(case):
    model = case[0]
    block = model.model.language_model.layers[2]
    attention = [getattr(block.self_attn, f"{n}_proj").weight.detach().numpy() for n in "qkvo"]
    ffn = [getattr(block.mlp, f"{n}_proj").weight.detach().numpy() for n in ("gate", "up", "down")]
    for norm in ("rms", "l2"):
        got = magnitude.weight_norms(probe_of(case), norm)
        for kind, matrices in (("attention", attention), ("ffn", ffn)):
            flat = np.concatenate([matrix.ravel() for matrix in matrices]).astype(np.float64)
            wanted = np.sqrt((flat**2).mean() if norm == "rms" else (flat**2).sum())
            assert got[kind][2] == pytest.approx(wanted, rel=1e-5)
    outcome = calibrated("magnitude", probe_of(case), {"share": 0.75})
    norms = [
        (n, layer, k) for k in ("attention", "ffn") for layer, n in enumerate(outcome.curves[f"norm_{k}"])
    ]
    dropped = {(layer, kind) for _, layer, kind in sorted(norms)[:12]}
    for row in resolve(outcome.decisions, case[1]).rows:
        gone = {kind for layer, kind in dropped if layer == row.layer}
        assert (row.execute == "none") == (gone == {"attention", "ffn"})
        assert row.sublayers == {frozenset({"ffn"}): "attention", frozenset({"attention"}): "ffn"}.get(
            frozenset(gone), "both"
        )


@torch.no_grad()
def test_attention_masses_of_the_plain_model(case):
    model, _, samples = case
    visual = visual_of(model, samples[0])
    text = [row for row in range(samples[0]["input_ids"].shape[1]) if row not in visual]
    weights = model(**samples[0], output_attentions=True).attentions[2][0].numpy()
    cross, own = fitprune.attention_masses(weights.max(axis=0), visual)
    for place, column in enumerate(visual):
        assert cross[place] == pytest.approx(sum(weights[:, row, column].max() for row in text), rel=1e-5)
        assert own[place] == pytest.approx(sum(weights[:, row, column].max() for row in visual), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.3, 0.8, 1.0])
def test_deletions_one_token_at_a_time(alpha):
    """Delete the least token while the mass that stays is at least 1 - alpha of the dense one."""
    generator = np.random.default_rng(7)
    masses = generator.random((2, 5, 12)) ** 3
    alive, wanted = set(range(12)), []
    for cross, own in zip(*masses, strict=True):
        sets = []
        for mass in (cross, own):
            going, left = set(), sum(mass[i] for i in alive)
            for i in sorted(alive, key=lambda i: mass[i]):
                left -= mass[i]
                if left < (1 - alpha) * mass.sum() - 1e-12:
                    break
                going.add(i)
            sets.append(going)
        both = sets[0] & sets[1]
        if both == alive:
            both = alive - {max(alive, key=lambda i: cross[i] * own[i])}
        alive -= both
        wanted.append(len(both))
    assert fitprune.deletions(*masses, alpha) == wanted
    assert sum(wanted) < 12


def test_fitprune_reaches_its_target_and_no_more_than_needed(case):
    spec = case[1]
    dense = macv(resolve(Decisions(), spec))
    for reduction in (0.3, 0.6):
        decisions = calibrated("fitprune", probe_of(case), {"reduction": reduction}).decisions
        assert 1 - macv(resolve(decisions, spec)) / dense >= reduction
        fewer = Decisions(select=decisions.select[:-1])
        assert 1 - macv(resolve(fewer, spec)) / dense < reduction
    with pytest.raises(
        UserError, match=r"reduction: 0\.99 cannot be reached on these samples; the most is 0\.\d"
    ):
        calibrated("fitprune", probe_of(case), {"reduction": 0.99})


# -- what is decided from parameters alone


def test_published_schedules_at_the_published_depth():
    class Published:  # LLaVA-1.5-7B's depth and tokens; nothing is measured
        def __init__(self, spec):
            self.spec = spec

        def sweep(self, what, candidates, distance):
            return (None,) * self.spec.layers

    spec = shipped.load("fastv-llava-15-7b").model

    def stages(name, **parameters):
        decisions = calibrated(name, Published(spec), parameters).decisions
        return [(select.layer, select.keep) for select in decisions.select], decisions

    pyramid, decisions = stages("pyramiddrop")
    assert (pyramid, decisions.positions) == ([(8, 288), (16, 144), (24, 72)], "compact")
    assert decisions.select[0].by == LastRowAttention(attention="own")
    sparse, decisions = stages("sparsevlm")
    assert sparse == [(3, 300), (7, 200), (16, 118)]
    assert decisions.select[0].by == TextAttention() and decisions.positions == "persistent"
    assert resolve(decisions, spec).mean_visual_tokens == 206.75
    assert stages("sparsevlm", tokens=64)[0] == [(3, 66), (7, 34), (16, 20)]
    random, decisions = stages("random-select", seed=5)
    assert random == [(0, 288)] and decisions.select[0].by == RandomOrder(seed=5)


def test_random_layers_are_drawn_from_the_last_half_by_the_seed(case):
    drawn = [
        calibrated("random-layers", probe_of(case), {"seed": seed}).decisions.layers for seed in range(20)
    ]
    layers = {layer for (rule,) in drawn for layer in rule.layers}
    assert layers == {4, 5, 6, 7}
    assert all(rule.execute == "none" and len(rule.layers) == 2 for (rule,) in drawn)


# -- compositions


MSV = Outcome(
    decisions=Decisions(encoder=EncoderStage(keep=6, by=MsvPrune(attention=1, middle=1, last=3, clusters=2)))
)


def test_spider_is_msv_prune_and_asl_skip(case):
    """The counts are shares of the rows that the encoder stage leaves."""
    asl = calibrated("asl-skip", probe_of(case), {"skipped": [0.25, 0.5, 1.0]})
    assert [stage.count for stage in asl.decisions.skip.stages] == [4, 8, 16]
    for order in ({"msv-prune": MSV, "asl-skip": asl}, {"asl-skip": asl, "msv-prune": MSV}):
        schedule = resolve(merge(order).decisions, case[1])
        assert schedule.visual_tokens == 6
        assert [row.skipped for row in schedule.skip_stages] == [2, 3, 6]
    assert merge({"asl-skip": asl}).decisions == asl.decisions


def test_encoder_v_skip_and_exit_compose(case):
    v_skip = calibrated("v-skip", probe_of(case), {"share": 0.25})
    shallow = Decisions(layers=tuple(LayerRule(layers=(n,), query="none") for n in (1, 2)))
    exit_ = Outcome(decisions=Decisions(exit=5))
    merged = merge({"msv-prune": MSV, "v-skip": Outcome(decisions=shallow), "vtw": exit_}).decisions
    schedule = resolve(merged, case[1])
    assert [row.live for row in schedule.rows] == [6] * 5 + [0] * 3
    assert [row.queries for row in schedule.rows] == [6, 0, 0, 6, 6, 0, 0, 0]
    assert resolve(merge({"msv-prune": MSV, "v-skip": v_skip}).decisions, case[1]).visual_tokens == 6


# -- what is refused


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("asl-skip", {"stages": [0.5, 0.25]}, r"stages: \[0\.5, 0\.25\] is not a rising list"),
        ("asl-skip", {"skipped": [0.5]}, "skipped: 1 shares for 3 stages"),
        ("asl-skip", {"threshold": 0}, "threshold: 0"),
        ("asl-skip", {"weights": [-1, 1]}, "weights: "),
        ("asl-skip", {"quantile": 2}, r"quantile: 2\.0"),
        ("asl-skip", {"entropy": False, "correlation": False}, "entropy, correlation: both are off"),
        ("asl-skip", {"share": 0}, "share: 0"),
        ("visipruner", {"mask": "additive"}, "merge: .* merge: false"),
        ("visipruner", {"exit_layers": 0}, "exit_layers: 0"),
        ("visipruner", {"threshold": -1}, "threshold: -1"),
        ("visipruner", {"keep_quantile": 1.5}, r"keep_quantile: 1\.5"),
        ("visipruner", {"filter_cosine": 2}, r"filter_cosine: 2\.0"),
        ("pyramiddrop", {"keep": [0.5]}, "keep: 1 budgets for 3 layers"),
        ("pyramiddrop", {"keep": [0.1, 0.2, 0.3]}, "keep: .* is not a falling list"),
        ("sparsevlm", {"tokens": 100}, "tokens: 100 is not one of 192, 128, 96, 64"),
        ("sparsevlm", {"keep": [0.5, 0.25]}, "keep: 2 budgets for 3 layers"),
        ("fitprune", {"reduction": 1}, r"reduction: 1\.0"),
        ("shortgpt", {"share": 1.5}, r"share: 1\.5"),
        ("magnitude", {"share": -1}, r"share: -1\.0"),
        ("random-layers", {"start": 1}, r"start: 1\.0"),
        ("random-select", {"layer": -1}, "layer: -1"),
        ("random-select", {"seed": -1}, "seed: -1"),
    ],
)
def test_impossible_parameters_are_refused_by_name(name, parameters, message):
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_parameters(find(name), parameters)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "asl-skip",
            {"threshold": 1000},
            r"threshold: at no stage .* reach 250\.0 \(1000\.0 at 32",
        ),
        ("asl-skip", {"stages": [0.9, 0.95, 1.0]}, "stages: 3 stages end at layer 9, but .* 0..7"),
        ("visipruner", {"shallow": 0.75}, "shallow: with 6 of 8 layers shallow"),
        ("visipruner", {"filter_cosine": -0.99}, "filter_cosine: in no sample"),
        ("pyramiddrop", {"layers": [0.9, 0.95, 1.0]}, "layers: 3 stages end at layer 9"),
        ("magnitude", {"share": 1.0}, "share: all 16 sub-layers"),
        ("random-layers", {"share": 0.75}, "share: 6 of 8 layers cannot be skipped from layer 4 on"),
        ("random-select", {"layer": 8}, r"layer: 8 is not within 0\.\.7"),
    ],
)
def test_what_this_model_cannot_follow_is_refused_by_name(case, name, parameters, message):
    with pytest.raises(UserError, match=message):
        calibrated(name, probe_of(case), parameters)


def test_skip_counts_without_an_encoder_stay():
    skip = SkipMode(stages=(SkipStage(layer=2, count=5),))
    rule = LayerRule(layers=(2, 3), query="unskipped")
    outcome = Outcome(decisions=Decisions(skip=skip, layers=(rule,)), counted_of=16)
    assert merge({"asl-skip": outcome}).decisions.skip == skip
