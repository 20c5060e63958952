"""The masked reference against a naive decoder that really gathers rows, for random decisions.

Persistent position ids: gathering rows and running the layer on them alone is the same function as the full
layer with the dropped keys masked. Compact ids: the naive decoder renumbers, and the result must differ.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from naive_decoder import NaiveDecoder
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    RouterScores,
    TextAttention,
    ValueInfluence,
)
from trimvlm.schedule import resolve
from trimvlm_export.reference import Reference

LAYERS, HEADS, KV, C, N = 4, 4, 2, 16, 16
SPEC = ModelSpec(
    family="llava",
    layers=LAYERS,
    hidden=64,
    heads=HEADS,
    kv_heads=KV,
    head_dim=C,
    ffn=96,
    vocab=64,
    visual_tokens=N,
)
ROUTER = np.random.default_rng(2).random(2 * N, np.float32)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("gather"), kv_heads=KV, attention_bias=True, seed=11)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, {images: tiny_inputs(path, images=images) for images in (1, 2)}


@torch.no_grad()
def compare(case, decisions, images=1, steps=(9, 30, 12)):
    """Selections, scores, skip stages, KV and logits over the prefill and three decode steps."""
    model, inputs, router = case[0], case[1][images], ROUTER[: images * N]
    naive, schedule = NaiveDecoder(model, decisions), resolve(decisions, SPEC)
    with Reference(model, schedule) as reference:
        run = reference.prefill(inputs, router_scores=router)
        wanted = [naive.prefill(inputs["input_ids"][0], reference.features(inputs), images, router)]
        got = [run.logits]
        for kv, cached in zip(run.kv, naive.cache, strict=True):
            assert (kv is None) == (cached is None)
            for ours, theirs in zip(kv or (), cached or (), strict=False):
                per_group = theirs[:, :: HEADS // KV].transpose(0, 1)[None]
                np.testing.assert_allclose(ours, per_group, atol=1e-4)
        for mask, visible in run.visible.items():
            layer = next(row.layer for row in schedule.rows if row.masked_by == mask and row.cached)
            assert visible.tolist() == naive.cache[layer][2]
        for token in steps:
            got.append(reference.step(token))
            wanted.append(naive.step(token))
    assert [list(rows) for rows in run.selected] == naive.selected
    assert [list(rows) for rows in run.skipped] == naive.skipped
    pairs = [
        *zip(run.scores, naive.scores, strict=True),
        *zip(run.skip_scores, naive.skip_scores, strict=True),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert tuple(run.visible) == schedule.masks
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    return run


OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
FASTV = Decisions(select=(Select(layer=2, keep=8, by=PREVIOUS),))
PDROP = Decisions(
    select=tuple(Select(layer=i, keep=k, by=OWN) for i, k in ((1, 8), (2, 4), (3, 2))), positions="compact"
)
FITPRUNE = CrossAndSelfAttention()
VISIPRUNER = Decisions(
    select=(Select(layer=2, keep=12, by=ValueInfluence(threshold=0.2)), Select(layer=3, keep=11, by=OWN)),
    layers=(
        LayerRule(layers=(0,), text_keys="sink", visual_keys="none"),
        LayerRule(layers=(3,), text_keys="live"),
    ),
    mask="post_softmax",
)
LATE_SINK = Decisions(  # seed 0 drops the first visual row
    select=(Select(layer=1, keep=5, by=RandomOrder(seed=0)),),
    layers=(LayerRule(layers=(2,), text_keys="sink"),),
    mask="post_softmax",
)
ASL_SKIP = Decisions(
    skip=SkipMode(
        stages=(SkipStage(layer=1, count=4), SkipStage(layer=2, count=9), SkipStage(layer=3, count=9))
    ),
    layers=(LayerRule(layers=(1, 3), query="unskipped"), LayerRule(layers=(2,), ffn="unskipped")),
)


@pytest.mark.parametrize(
    "decisions",
    [
        FASTV,
        PDROP,
        Decisions(exit=2),
        Decisions(exit=2, positions="compact"),
        Decisions(inject=1, exit=3, select=(Select(layer=2, keep=5, by=OWN),)),
        Decisions(inject=2, select=(Select(layer=2, keep=5, by=OWN), Select(layer=3, keep=1, by=PREVIOUS))),
        Decisions(layers=(LayerRule(layers=(0, 2), cache="none"), LayerRule(layers=(1,), execute="none"))),
        Decisions(layers=(LayerRule(layers=(0, 1), text_keys="none"),), mask="post_softmax"),
        VISIPRUNER,
        Decisions(
            select=(Select(layer=1, keep=12, by=TextAttention()), Select(layer=3, keep=5, by=TextAttention()))
        ),
        Decisions(select=tuple(Select(layer=i, keep=15 - 4 * i, by=FITPRUNE) for i in range(4))),
        ASL_SKIP,
        Decisions(
            select=(Select(layer=2, keep=5, by=RouterScores()),),
            layers=(LayerRule(layers=(3,), execute="none"),),
        ),
        Decisions(select=(Select(layer=1, keep=5, by=RandomOrder(seed=4)),)),
        LATE_SINK,
        Decisions(
            layers=(LayerRule(layers=(1,), sublayers="ffn"), LayerRule(layers=(2,), sublayers="attention"))
        ),
        Decisions(layers=(LayerRule(layers=(1, 3), execute="decode"),)),
    ],
    ids=[
        "fastv", "pyramiddrop", "vtw", "vtw-compact", "hidivdrop", "late", "cache", "shallow", "visipruner",
        "sparsevlm", "fitprune", "spider", "par", "random", "late-sink", "llm-drop", "shortgpt",
    ],
)  # fmt: skip
@pytest.mark.parametrize("images", [1, 2])
def test_masking_equals_gathering(case, decisions, images):
    compare(case, decisions, images)


RULES = (
    OWN,
    PREVIOUS,
    TextAttention(),
    *(ValueInfluence(threshold=threshold) for threshold in (None, 0.0, 0.1, 0.2, 0.4)),
    CrossAndSelfAttention(),
    RandomOrder(seed=3),
    RouterScores(),
)


@st.composite
def skip_modes(draw, layers):
    """At most two stages from the first of `layers` on, and what the rows that skip bypass there."""
    at = sorted(draw(st.sets(st.sampled_from(layers), min_size=1, max_size=2)))
    counts = sorted(draw(st.lists(st.integers(1, N // 2), min_size=len(at), max_size=len(at))))
    terms = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    stages = tuple(SkipStage(layer=layer, count=count) for layer, count in zip(at, counts, strict=True))
    after = tuple(layer for layer in layers if layer >= at[0])
    bypassed = st.sampled_from(
        [LayerRule(layers=after, query="unskipped"), LayerRule(layers=after, ffn="unskipped")]
    )
    return SkipMode(stages=stages, entropy=terms[0], correlation=terms[1]), draw(bypassed)


@st.composite
def any_decisions(draw):
    """Whatever the validator might allow."""
    inject = draw(st.sampled_from([0, 0, 1, 2]))
    exit_ = draw(st.sampled_from([None, None, None, 3]))
    layers = list(range(inject, exit_ or LAYERS))
    selects, live = [], N
    for layer in sorted(draw(st.sets(st.sampled_from(layers), max_size=2))):
        live = draw(st.integers(max(1, live // 2), live))
        selects.append(Select(layer=layer, keep=live, by=draw(st.sampled_from(RULES))))
    rules = draw(st.lists(layer_rules, max_size=2))
    skip = None
    free = [layer for layer in layers if not selects or layer > selects[-1].layer]
    if free and draw(st.integers(0, 2)) == 0:
        skip, rule = draw(skip_modes(free))
        rules = [rule, *rules[:1]]
    return Decisions(
        inject=inject,
        exit=exit_,
        select=tuple(selects),
        skip=skip,
        layers=tuple(rules),
        positions=draw(st.sampled_from(["persistent", "persistent", "compact"])),
        mask=draw(st.sampled_from(["additive", "post_softmax"])),
    )


def either(*values):
    return st.sampled_from([None, None, *values])


layer_rules = st.builds(
    LayerRule,
    layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=2, unique=True).map(tuple),
    query=either("none"),
    text_keys=either("none", "sink"),
    visual_keys=either("none"),
    ffn=either("none"),
    cache=either("none"),
    execute=either(None, None, None, "none", "decode"),
    sublayers=either(None, None, "attention", "ffn"),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(any_decisions())
def test_masking_equals_gathering_for_whatever_is_allowed(case, decisions):
    try:
        resolve(decisions, SPEC)
    except UserError:
        assume(False)
    compare(case, decisions)


def test_compact_ids_are_another_function(case):
    persistent = compare(case, FASTV)
    compact = compare(case, msgspec.structs.replace(FASTV, positions="compact"))
    assert list(persistent.selected[0]) == list(compact.selected[0])
    assert np.abs(persistent.logits - compact.logits).max() > 0.01
