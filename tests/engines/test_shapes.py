"""Shape ranges follow from the Schedule and the target's limits."""

from __future__ import annotations

import pytest

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, RouterScores, ValueInfluence
from trimvlm.schedule import resolve
from trimvlm.target import Limits
from trimvlm_engines.shapes import ShapeRange, decoder_ranges, images_range

MODEL = ModelSpec(
    family="llava", layers=6, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=96, vocab=99, visual_tokens=576
)
LIMITS = Limits(images=2, text=100, new_tokens=50)
KEEP_288 = Select(layer=2, keep=288, by=LastRowAttention(attention="previous"))


def test_one_joint_range_for_prefill_and_decode() -> None:
    ranges = decoder_ranges(resolve(Decisions(), MODEL), LIMITS)
    assert ranges["input_ids"] == ranges["text_positions"] == ShapeRange(min=(1,), opt=(32,), max=(100,))
    assert ranges["visual"] == ShapeRange(min=(0, 64), opt=(576, 64), max=(1152, 64))
    assert ranges["visual_positions"] == ShapeRange(min=(0,), opt=(576,), max=(1152,))
    assert ranges["past_key.5"] == ShapeRange(min=(1, 2, 0, 16), opt=(1, 2, 0, 16), max=(1, 2, 1302, 16))
    assert len(ranges) == 4 + 2 * 6


def test_each_budget_has_its_own_past_and_each_stage_its_forced_indices() -> None:
    decisions = Decisions(select=(KEEP_288,), exit=4, layers=(LayerRule(layers=(3,), execute="none"),))
    ranges = decoder_ranges(resolve(decisions, MODEL), LIMITS)
    past = {name: shape.max[2] for name, shape in ranges.items() if name.startswith("past_key")}
    assert past == {
        "past_key.0": 1152 + 150,
        "past_key.1": 1152 + 150,
        "past_key.2": 576 + 150,
        "past_key.4": 150,
        "past_key.5": 150,
    }
    assert ranges["forced.0"] == ShapeRange(min=(0,), opt=(0,), max=(576,))


def test_short_prompts_stay_within_the_limits() -> None:
    ranges = decoder_ranges(resolve(Decisions(), MODEL), Limits(images=1, text=8, new_tokens=1))
    assert ranges["input_ids"] == ShapeRange(min=(1,), opt=(8,), max=(8,))


def test_more_kept_tokens_than_topk_takes() -> None:
    schedule = resolve(Decisions(select=(KEEP_288,)), MODEL)
    assert decoder_ranges(schedule, Limits(images=13))["forced.0"].max == (13 * 288,)
    with pytest.raises(
        UserError, match=r"layer 2: select.keep: 14 images keep 4032 .* at most 3840; lower limits.images"
    ):
        decoder_ranges(schedule, Limits(images=14))


def test_masks_router_and_skip_stages_have_inputs_of_their_own() -> None:
    decisions = Decisions(
        select=(
            Select(layer=1, keep=500, by=RouterScores()),
            Select(layer=2, keep=100, by=ValueInfluence(threshold=0.2)),
        ),
        skip=SkipMode(stages=(SkipStage(layer=3, count=20), SkipStage(layer=4, count=70))),
        layers=(LayerRule(layers=(4,), query="unskipped"), LayerRule(layers=(5,), cache="none")),
    )
    ranges = decoder_ranges(resolve(decisions, MODEL), LIMITS)
    assert ranges["router_scores"] == ranges["visual_positions"]
    assert ranges["past_visible.1"] == ShapeRange(min=(0,), opt=(0,), max=(200 + 150,))
    assert [ranges[f"forced_skip.{k}"].max for k in range(2)] == [(40,), (140,)]
    assert len(ranges) == 4 + 1 + 2 + 2 + 2 * 6 + 1


def test_more_rows_than_topk_takes_in_or_out_of_skip_mode() -> None:
    for count in (1, 576):
        skip = SkipMode(stages=(SkipStage(layer=3, count=count),))
        decisions = Decisions(skip=skip, layers=(LayerRule(layers=(4,), query="unskipped"),))
        schedule = resolve(decisions, MODEL)
        assert decoder_ranges(schedule, Limits(images=6))["forced_skip.0"].max == (6 * count,)
        with pytest.raises(
            UserError, match=r"layer 3: skip.stages: of 7 images .* 3840; lower limits.images"
        ):
            decoder_ranges(schedule, Limits(images=7))


def test_images() -> None:
    shape = (1, 3, 32, 48)
    assert images_range(shape, LIMITS, one=False).plain() == [[*shape], [*shape], [2, 3, 32, 48]]
    assert images_range(shape, LIMITS, one=True).plain() == [[*shape]] * 3


def test_ranges_that_are_none() -> None:
    with pytest.raises(UserError, match="not ascending"):
        ShapeRange(min=(2,), opt=(1,), max=(3,))
    with pytest.raises(UserError, match="different numbers of dimensions"):
        ShapeRange(min=(1,), opt=(1, 2), max=(3,))
