"""HiDivDrop's budgets: the published ones, and concave pyramids for any mean."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimvlm.errors import UserError
from trimvlm_calib.pyramid import PUBLISHED, concave_pyramid


@pytest.mark.parametrize(("name", "mean"), [("tok48", 48.0), ("tok64", 64.0), ("tok80", 80.03125)])
def test_published_schedules_have_their_means_and_are_found_from_them(name, mean):
    known = PUBLISHED[name]
    budgets = dict(zip(known.filters, known.keep, strict=True))
    live, total = 0, 0
    for layer in range(32):
        live = 576 if layer == 8 else 0 if layer == 24 else budgets.get(layer, live)
        total += live
    assert total / 32 == mean
    found = concave_pyramid(mean, tokens=576, layers=32, inject=8, exit_=24, filters=known.filters)
    assert tuple(found) == known.keep


def test_mobilellama_has_the_published_mean():
    """MobileLLaMA-2.7B: injection 15, exit 28 (both 1-based), filters 16 19 22 25, 64 tokens, 0.17 T."""
    found = concave_pyramid(64.0, tokens=576, layers=32, inject=14, exit_=27, filters=(16, 19, 22, 25))
    assert found == [283, 10, 5, 1]


@st.composite
def pyramids(draw):
    layers = draw(st.integers(2, 48))
    inject = draw(st.integers(0, layers - 1))
    exit_ = draw(st.integers(inject + 1, layers))
    window = st.integers(inject, exit_ - 1)
    filters = sorted(draw(st.sets(window, min_size=1, max_size=min(7, exit_ - inject))))
    tokens = draw(st.integers(1, 700))
    inner = exit_ - filters[0]
    outer = tokens * (filters[0] - inject)
    total = draw(st.floats(outer + inner, outer + tokens * inner))
    return {
        "mean": total / layers,
        "tokens": tokens,
        "layers": layers,
        "inject": inject,
        "exit_": exit_,
        "filters": filters,
    }


@given(pyramids())
def test_a_pyramid_is_concave_and_has_its_mean(case):
    try:
        kept = concave_pyramid(**case)
    except UserError:  # the mean was rounded out of the range at one of its ends
        total = case["mean"] * case["layers"]
        ends = [
            case["tokens"] * (case["filters"][0] - case["inject"])
            + each * (case["exit_"] - case["filters"][0])
            for each in (1, case["tokens"])
        ]
        assert min(abs(total - end) for end in ends) < 1e-6
        return
    assert len(kept) == len(case["filters"])
    assert all(1 <= keep <= case["tokens"] for keep in kept)
    drops = [a - b for a, b in itertools.pairwise(kept)]
    assert all(drop >= 0 for drop in drops)
    assert drops == sorted(drops, reverse=True)
    budgets = dict(zip(case["filters"], kept, strict=True))
    live, total = case["tokens"], 0
    for layer in range(case["inject"], case["exit_"]):
        live = budgets.get(layer, live)
        total += live
    assert abs(total / case["layers"] - case["mean"]) <= 0.5


@pytest.mark.parametrize("mean", [35.0, 300.0])
def test_a_mean_out_of_reach_is_refused_with_the_range(mean):
    with pytest.raises(UserError, match=r"mean: \d+ tokens .* 36\.44 to 288 can"):
        concave_pyramid(mean, tokens=576, layers=32, inject=8, exit_=24, filters=(10, 14, 16, 18))
