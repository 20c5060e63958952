"""The encoder stage's rules in numpy against the same rules as loops (`reference_encoder_rules`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimvlm.encoder import make_encoder
from trimvlm.encoder.msv_prune import kmeans, quotas
from trimvlm.encoder.ranking import highest
from trimvlm.encoder.vispruner import distinct
from trimvlm.encoder_rules import (
    EncoderRule,
    EncoderStage,
    HiPrune,
    MsvPrune,
    PruMerge,
    VisionZip,
    VisPruner,
    taps,
)
from trimvlm.rules import RandomOrder
from trimvlm_export.reference_encoder_rules import View, reduce

HEADS, WIDTH, LAYERS = 2, 8, 3


def view_of(seed: int, side: int, levels: int | None = None) -> View:
    """A random tower. With `levels` attention takes so few values that it ties, exactly."""
    random, rows = np.random.default_rng(seed), side * side + 1
    attentions = random.dirichlet(np.full(rows, 0.3), (LAYERS, HEADS, rows)).astype(np.float32)
    if levels:
        attentions = np.broadcast_to(random.integers(0, levels, (LAYERS, 1, 1, rows)), attentions.shape) / 64
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    return View(
        attentions=list(attentions.astype(np.float32)),
        states=list(normal(LAYERS + 1, rows, WIDTH)),
        queries=list(normal(LAYERS, rows, WIDTH)),
        keys=list(normal(LAYERS, rows, WIDTH)),
        features=normal(rows, WIDTH + 3),
    )


def outputs_of(view: View, rule: EncoderRule) -> dict[str, np.ndarray]:
    """The vision graph's outputs of that tower."""
    found: dict[str, np.ndarray] = {"tower": view.features}
    for name in taps(rule).names:
        kind, number = name.split(".")
        layer = int(number)
        if kind == "features":
            found[name] = view.states[layer]
        elif kind == "keys":
            found[name] = view.keys[layer].reshape(-1, HEADS, WIDTH // HEADS)
        elif kind == "joint_attention":
            logits = (view.keys[layer] @ view.queries[layer][0] / WIDTH**0.5).astype(np.float64)
            found[name] = (np.exp(logits) / np.exp(logits).sum())[1:].astype(np.float32)
        elif kind == "cls_attention":
            found[name] = view.attentions[layer][:, 0, 1:].mean(axis=0)
        else:
            found[name] = view.attentions[layer].mean(axis=(0, 1))[1:]
    return found


def both(view: View, rule: EncoderRule, keep: int) -> tuple[Any, Any]:
    stage = EncoderStage(keep=keep, by=rule)
    return make_encoder(stage, view.patches)(outputs_of(view, rule)), reduce(stage, view)


def check(view: View, rule: EncoderRule, keep: int) -> np.ndarray:
    (rows, chosen), (rows_wanted, wanted) = both(view, rule, keep)
    assert chosen.dtype == np.int64 and chosen.tolist() == wanted.tolist()
    assert rows.shape == (keep, view.features.shape[1])
    np.testing.assert_allclose(rows, rows_wanted, atol=1e-5)
    return chosen


towers = st.builds(
    view_of, st.integers(0, 2**32 - 1), st.integers(3, 6), st.one_of(st.none(), st.integers(1, 4))
)
shares = st.floats(0, 1)


@settings(deadline=None, max_examples=60)
@given(view=towers, share=shares, keep=shares, clusters=st.integers(1, 5), received=st.booleans())
def test_msv_prune(view: View, share: float, keep: float, clusters: int, received: bool) -> None:
    budget = max(clusters, round(keep * view.patches))
    if 0 < budget - int(budget * share) < clusters:  # which the profile refuses
        share = 1.0
    rule = MsvPrune(
        anchors=share, clusters=clusters, attention=1, received=received, middle=1, last=LAYERS, iterations=3
    )
    chosen = check(view, rule, budget)
    assert (np.diff(chosen) > 0).all() and len(chosen) == budget


@settings(deadline=None, max_examples=60)
@given(view=towers, share=shares, keep=shares, received=st.booleans())
def test_vispruner(view: View, share: float, keep: float, received: bool) -> None:
    budget = max(1, round(keep * view.patches))
    rule = VisPruner(important=share, attention=2, received=received, features=2)
    assert (np.diff(check(view, rule, budget)) > 0).all()


@settings(deadline=None, max_examples=60)
@given(view=towers, share=shares, keep=shares)
def test_visionzip(view: View, share: float, keep: float) -> None:
    budget = max(1, round(keep * view.patches))
    rule = VisionZip(contextual=int(share * (budget - 1)), attention=1, keys=2)
    chosen = check(view, rule, budget)
    dominant = chosen[: budget - 1 - rule.contextual]
    assert (np.diff(dominant) > 0).all() and len(set(chosen.tolist())) == budget - 1


@settings(deadline=None, max_examples=60)
@given(view=towers, alpha=shares, keep=shares)
def test_hiprune_is_one_ranking_of_deep_attention_plus_a_mark(view: View, alpha: float, keep: float) -> None:
    budget = max(1, round(keep * view.patches))
    rule = HiPrune(alpha=alpha, object_layer=0, deep_layer=1)
    chosen = check(view, rule, budget)
    outputs, side = outputs_of(view, rule), int(view.patches**0.5)
    mask = np.zeros(view.patches)
    for anchor in highest(outputs["received_attention.0"], round(budget * alpha / 5)):
        for step in (0, 1, -1, side, -side):
            mask[min(max(anchor + step, 0), view.patches - 1)] = 1
    score = outputs["received_attention.1"].astype(np.float64) + 2 * mask
    assert chosen.tolist() == sorted(highest(score, budget).tolist())


@settings(deadline=None, max_examples=60)
@given(view=towers, keep=shares, neighbours=st.integers(1, 8))
def test_prumerge(view: View, keep: float, neighbours: int) -> None:
    budget = max(2, round(keep * view.patches))
    rule = PruMerge(neighbours=neighbours, layer=2)
    chosen = check(view, rule, budget)
    assert (np.diff(outputs_of(view, rule)["joint_attention.2"][chosen]) <= 0).all()


@given(seed=st.integers(0, 2**31), keep=st.integers(1, 9))
def test_random_is_the_same_for_every_image(seed: int, keep: int) -> None:
    one, two = view_of(0, 3), view_of(1, 3)
    rule = RandomOrder(seed=seed)
    assert check(one, rule, keep).tolist() == check(two, rule, keep).tolist()
    places = np.random.default_rng(seed).permutation(9)
    assert {p for p in range(9) if places[p] >= 9 - keep} == set(check(one, rule, keep).tolist())


def test_random_depends_on_the_seed() -> None:
    view = view_of(0, 6)
    chosen = [tuple(check(view, RandomOrder(seed=seed), 12)) for seed in range(5)]
    assert len(set(chosen)) == 5


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8), share=shares)
def test_quotas_use_up_the_budget(sizes: list[int], share: float) -> None:
    filled = [size for size in sizes if size]
    if not filled:
        return
    total = max(len(filled), round(share * sum(sizes)))
    quota = quotas(np.array(sizes), total)
    assert sum(quota) == total
    assert all(min(size, 1) <= number <= size for number, size in zip(quota, sizes, strict=True))


def test_quotas_are_equation_two_where_it_adds_up() -> None:
    assert quotas(np.array([40, 30, 20, 10]), 50) == [20, 15, 10, 5]
    assert quotas(np.array([100, 1, 1, 98]), 50) == [25 - 1, 1, 1, 24]  # 25 + 1 + 1 + 24.5 -> 24 is 51
    assert quotas(np.array([3, 3, 3, 3]), 10) == [3, 3, 2, 2]  # 2.5 each is 2: the largest cannot take both


def test_kmeans_starts_far_apart_and_keeps_empty_centres() -> None:
    points = np.array([[0, 0], [0, 1], [10, 0], [10, 1], [0, 20], [1, 20]], np.float32)
    found = kmeans(points, 3, 10)
    assert found[0] == found[1] and found[2] == found[3] and found[4] == found[5]
    assert len(set(found.tolist())) == 3
    assert found[5] == 0, "the first centre is the point farthest from the mean"
    same = kmeans(np.ones((4, 2), np.float32), 3, 2)
    assert same.tolist() == [0, 0, 0, 0], "ties go to the first cluster, the others stay empty"


@pytest.mark.parametrize(("patches", "keep", "share"), [(36, 16, 0.5), (36, 10, 0.2), (64, 40, 0.3)])
def test_vispruner_is_the_published_loop_where_that_runs(patches: int, keep: int, share: float) -> None:
    """Even residuals and none or at least eight diverse tokens: as the released code computes it."""
    random = np.random.default_rng(patches)
    features = random.standard_normal((patches, WIDTH)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = random.permutation(patches)
    residual, wanted = order[int(keep * share) :], keep - int(keep * share)
    ours = distinct(features, residual, wanted)
    while len(residual) > wanted:
        count = len(residual)
        drop = min(8, count - wanted)
        tokens = features[residual]
        score = (tokens[::2] @ tokens[1::2].T).max(axis=-1)
        stay = (-score).argsort()[drop:]
        assert len(stay) == count // 2 - drop, "the released code indexes with this size"
        residual = np.concatenate([residual[::2][stay], residual[1::2]])
    assert ours.tolist() == residual.tolist()


def test_half_precision_rows_stay_half() -> None:
    view = view_of(4, 4)
    for rule in (
        RandomOrder(),
        VisionZip(contextual=2, attention=1, keys=1),
        PruMerge(neighbours=3, layer=1),
    ):
        outputs = outputs_of(view, rule)
        outputs["tower"] = outputs["tower"].astype(np.float16)
        rows, _ = make_encoder(EncoderStage(keep=6, by=rule), 16)(outputs)
        assert rows.dtype == np.float16
        np.testing.assert_allclose(rows, both(view, rule, 6)[1][0], atol=0.02)
