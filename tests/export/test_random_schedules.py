"""The exported decoder computes what the reference computes: two implementations, one Schedule.

Random valid Schedules, with every field of the Schedule in them, on random tiny decoders and random prompts.
Each case runs the traced module in eager torch. Exported graphs run in ONNX Runtime, in both lowerings: one
with a bit of everything, and as many of the random cases as `TRIMVLM_GRAPHS` says (a few seconds each).
`TRIMVLM_SCHEDULES` says how many random cases there are.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import get_args, get_type_hints

import pytest
from decoder_feeds import prefill_feeds
from random_decisions import random_decisions
from schedule_cases import MODELS, agree, case_of, eager, everything, expected, graphs_agree, loaded

from trimvlm.profile import Decisions, LayerRule, ModelSpec
from trimvlm.rules import SelectionRule
from trimvlm.schedule import Row, resolve
from trimvlm.target import Limits
from trimvlm_engines.shapes import decoder_ranges
from trimvlm_export.graph_io import decoder_inputs

SCHEDULES = int(os.environ.get("TRIMVLM_SCHEDULES", "40"))
GRAPHS = int(os.environ.get("TRIMVLM_GRAPHS", "0"))
SPEC = ModelSpec(
    family="llava", layers=5, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=64, visual_tokens=16
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("number", range(SCHEDULES))
def test_decoder_equals_reference(checkpoints: Path, number: int) -> None:
    model, spec, source = loaded(checkpoints, list(MODELS)[number % 5])
    case = case_of(number, spec)
    theirs = expected(case, model)
    agree(eager(case, source), theirs)
    agree(eager(case, source, filled=True), theirs)
    if number < GRAPHS:
        graphs_agree(case, source, f"case-{number}", theirs)


def test_graphs_equal_reference(checkpoints: Path) -> None:
    model, spec, source = loaded(checkpoints, "mqa-3-by-3")
    case = case_of(1, spec, everything())
    theirs = expected(case, model)
    assert not all(theirs[0]["present_visible.4"])
    agree(eager(case, source), theirs)
    graphs_agree(case, source, "everything", theirs)


def test_graphs_of_an_image_that_comes_first(checkpoints: Path) -> None:
    """Its first row sees no key at all; runtimes' own answer to that is no zero."""
    model, spec, source = loaded(checkpoints, "two-layers")
    decisions = Decisions(layers=(LayerRule(layers=(0,), visual_keys="none"),))
    case = case_of(2, spec, decisions)
    assert case.prompt.visual_positions[0] == 0
    graphs_agree(case, source, "image-first", expected(case, model))


def test_random_schedules_say_everything() -> None:
    """Every rule, and every value of every field, is among the cases."""
    found = [resolve(random_decisions(Random(number), SPEC), SPEC) for number in range(200)]
    rows = [row for schedule in found for row in schedule.rows]
    for field in ("query", "text_keys", "visual_keys", "ffn", "cache", "execute", "sublayers"):
        kind = get_type_hints(Row)[field]
        assert {getattr(row, field) for row in rows} == set(get_args(kind)), field
    rules = {type(row.select.by) for row in rows if row.select}
    assert rules == set(get_args(SelectionRule))
    assert {len(schedule.masks) for schedule in found} >= {0, 1, 2}
    assert {schedule.positions for schedule in found} == {"persistent", "compact"}
    assert {schedule.visual_tokens < 16 for schedule in found} == {True, False}


def test_graph_builder_and_bench_know_the_same_inputs() -> None:
    for number in range(100):
        schedule = resolve(random_decisions(Random(number), SPEC), SPEC)
        names = set(decoder_inputs(schedule))
        feeds = prefill_feeds(schedule, text=6, before_image=2)
        ranges = decoder_ranges(schedule, Limits(images=2))
        assert names == set(feeds) == set(ranges)
        for name, dims in decoder_inputs(schedule).items():
            low, high = ranges[name].min, ranges[name].max
            assert len(dims) == len(low), name
            for dim, least, most, size in zip(dims, low, high, feeds[name].shape, strict=True):
                assert least <= size <= most and (isinstance(dim, str) or dim == least == most), name
