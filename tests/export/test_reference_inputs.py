"""What a prefill may be given: indices from outside, router scores, rows that an encoder stage reduced."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    LastRowAttention,
    RandomOrder,
    RouterScores,
    TextAttention,
    ValueInfluence,
)
from trimvlm.schedule import resolve
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.reference import Reference
from trimvlm_export.reference_skip import Skipping, redundancy_growth

SKIP = Decisions(
    skip=SkipMode(stages=(SkipStage(layer=1, count=4), SkipStage(layer=2, count=9))),
    layers=(LayerRule(layers=(1, 2, 3), query="unskipped"),),
)
STAGE = EncoderStage(keep=5, by=RandomOrder(seed=3))
PATCHES = np.sort(np.argsort(np.random.default_rng(3).permutation(16))[-5:])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    path = tiny_llava(tmp_path_factory.mktemp("inputs"), kv_heads=2, seed=8)
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype="float32").eval()
    return model, model_spec(path), {images: tiny_inputs(path, images=images) for images in (0, 1, 2)}


def prefill(case, decisions, images=1, **kwargs) -> Any:
    model, spec, inputs = case
    with Reference(model, resolve(decisions, spec), decisions.encoder) as reference:
        return reference.prefill(inputs[images], **kwargs)


def test_forced_rows_skip_instead(case):
    free = prefill(case, SKIP)
    again = prefill(case, SKIP, forced_skip=free.skipped)
    np.testing.assert_array_equal(again.logits, free.logits)
    other = [np.arange(4), np.arange(9)]
    forced = prefill(case, SKIP, forced_skip=other)
    assert [rows.tolist() for rows in forced.skipped] == [rows.tolist() for rows in other]
    assert np.abs(forced.logits - free.logits).max() > 0.01
    np.testing.assert_array_equal(forced.skip_scores[0], free.skip_scores[0])
    select = (Select(layer=0, keep=9, by=RandomOrder(seed=0)),)
    with pytest.raises(AssertionError, match="layer 2: forced rows are not live"):
        prefill(case, msgspec.structs.replace(SKIP, select=select), forced_skip=[[], np.arange(9)])


def test_skip_stages_nest_and_have_exact_sizes(case):
    for images in (1, 2):
        run = prefill(case, SKIP, images)
        first, second = (set(rows.tolist()) for rows in run.skipped)
        assert first < second
        assert [len(first), len(second)] == [4 * images, 9 * images]


def test_redundancy_by_hand():
    """Entropy of one-hot and uniform rows, cosine with a text mean along the first axis."""
    visual = torch.tensor([[9.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    text, head = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), 50 * torch.eye(2)
    both = redundancy_growth(SkipMode(stages=(SkipStage(layer=0, count=1),)), visual, text, head)
    # Entropies 0, ln 2, ln 2 scale to 0, 1, 1; cosines 1, 0, sqrt(1/2) to themselves.
    np.testing.assert_allclose(both, [0, 0, 0], atol=1e-6)
    entropy = SkipMode(stages=(SkipStage(layer=0, count=1),), correlation=False)
    np.testing.assert_allclose(redundancy_growth(entropy, visual, text, head), [1, 0, 0], atol=1e-6)
    cosine = SkipMode(stages=(SkipStage(layer=0, count=1),), entropy=False)
    np.testing.assert_allclose(redundancy_growth(cosine, visual, text, head), [0, 1, 1 - 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(redundancy_growth(cosine, visual[:1], text, head), [1])  # a constant term is 0


def test_skipping_rows_stay_whatever_the_others_get():
    skipping = Skipping.none(6)
    live = np.array([0, 2, 3, 5])
    skipping.advance(np.array([0.5, 0.7, 0.7, 0.1], np.float32), live, 1)
    assert np.flatnonzero(skipping.rows).tolist() == [2]  # ties go to the lower index
    skipping.advance(np.array([0.9, 0.0, 0.1, 0.2], np.float32), live, 2)
    assert np.flatnonzero(skipping.rows).tolist() == [0, 2]
    np.testing.assert_allclose(skipping.accumulator[live], [1.4, 0.7, 0.8, 0.3])


def test_router_scores_are_wanted_where_a_selection_ranks_by_them(case):
    decisions = Decisions(select=(Select(layer=2, keep=3, by=RouterScores()),))
    scores = np.zeros(16, np.float32)
    scores[[1, 7, 11, 12]] = 1
    assert prefill(case, decisions, router_scores=scores).selected[0].tolist() == [1, 7, 11]
    with pytest.raises(UserError, match="router_scores: missing"):
        prefill(case, decisions)
    with pytest.raises(UserError, match=r"router_scores: shape \(15,\)"):
        prefill(case, decisions, router_scores=scores[:15])


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2])
def test_an_encoder_stage_is_a_shorter_prompt_for_the_plain_model(case, images):
    """Positions are those of a prompt with `keep` visual tokens: the plain model on such embeddings."""
    model, spec, inputs = case
    decisions = Decisions(encoder=STAGE)
    ids = inputs[images]["input_ids"]
    whole = model.get_image_features(pixel_values=inputs[images]["pixel_values"]).pooler_output
    rows = torch.cat([image[PATCHES] for image in whole])
    place = (ids[0] == 4).cumsum(0) - 1
    short = ids[:, (ids[0] != 4) | (place % 16 < 5)]
    embedded = model.get_input_embeddings()(short)
    embedded[short == 4] = rows
    plain = model.generate(
        inputs_embeds=embedded, attention_mask=torch.ones_like(short), max_new_tokens=6, do_sample=False
    )[0].tolist()
    with Reference(model, resolve(decisions, spec), STAGE) as reference:
        features, chosen = reference.encode(inputs[images])
        assert [patches.tolist() for patches in chosen] == [PATCHES.tolist()] * images
        torch.testing.assert_close(features, rows)
        assert reference.generate(inputs[images], 6) == plain
        run = reference.prefill(inputs[images])
    with Reference(model, resolve(decisions, spec)) as reference:  # rows and prompt reduced elsewhere
        elsewhere = reference.prefill({"input_ids": short}, features=features)
    np.testing.assert_array_equal(elsewhere.logits, run.logits)
    logits = model(inputs_embeds=embedded, attention_mask=torch.ones_like(short)).logits[0, -1]
    np.testing.assert_allclose(run.logits, logits, atol=1e-5)


def test_an_encoder_stage_and_the_schedule_must_agree(case):
    model, spec, inputs = case
    with pytest.raises(UserError, match=r"encoder.keep: 5 rows, but the schedule is for 16"):
        Reference(model, resolve(Decisions(), spec), STAGE)
    with (
        Reference(model, resolve(Decisions(encoder=STAGE), spec)) as reference,
        pytest.raises(UserError, match="16 image tokens, not a multiple of the 5"),
    ):
        reference.prefill(inputs[1])


@pytest.mark.parametrize(
    "decisions",
    [
        SKIP,
        *(
            Decisions(select=(Select(layer=1, keep=3, by=rule),), exit=3)
            for rule in (
                LastRowAttention(attention="own"),
                LastRowAttention(attention="previous"),
                TextAttention(),
                ValueInfluence(threshold=0.1),
                CrossAndSelfAttention(),
                RandomOrder(),
                RouterScores(),
            )
        ),
    ],
)
def test_a_prompt_without_images_is_dense(case, decisions):
    pruned, dense = (prefill(case, each, images=0) for each in (decisions, Decisions()))
    np.testing.assert_array_equal(pruned.logits, dense.logits)
    assert all(visible.all() for visible in pruned.visible.values())
    assert all(not len(rows) for rows in (*pruned.selected, *pruned.skipped))
