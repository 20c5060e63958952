"""Comparison at matched FLOPs: intervals, matching, the tables and the plot."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimvlm.accounting import mac2
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm.value import Value
from trimvlm_calib.outcome import Outcome
from trimvlm_tools.compare import matching
from trimvlm_tools.compare.matching import TOLERANCE, match
from trimvlm_tools.compare.pipeline import Comparison, Point
from trimvlm_tools.compare.report import accuracy_figure, as_markdown
from trimvlm_tools.compare.statistics import difference, interval

SPEC = ModelSpec(
    family="llava", layers=8, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=128, vocab=100,
    visual_tokens=100,
)  # fmt: skip
PROBE: Any = SimpleNamespace(spec=SPEC, scope="")


class Parameters(Value, frozen=True, kw_only=True):
    keep: float = 0.5
    layer: int = 2


def method(*, needs: float = 0.0) -> Any:
    """FastV without a model; it gives up under a share of `needs`."""

    def calibrate(probe: Any, parameters: Parameters) -> Outcome:
        if parameters.keep <= needs:
            raise UserError("nothing to keep")
        keep = max(1, round(parameters.keep * SPEC.visual_tokens))
        by = LastRowAttention(attention="own")
        return Outcome(decisions=Decisions(select=(Select(layer=parameters.layer, keep=keep, by=by),)))

    return SimpleNamespace(at_share=lambda share: Parameters(keep=share), calibrate=calibrate)


def skip(count: int) -> Any:
    """V-Skip of so many layers, whatever the share."""
    rule = LayerRule(layers=tuple(range(count)), query="none")
    return SimpleNamespace(
        at_share=lambda share: Parameters(),
        calibrate=lambda probe, parameters: Outcome(decisions=Decisions(layers=(rule,))),
    )


def known(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> None:
    monkeypatch.setattr(
        matching, "find", lambda expression: {name: methods[name] for name in expression.split("+")}
    )


@pytest.mark.parametrize("target", [0.9, 0.55, 0.4, 0.3])
def test_the_search_finds_the_nearest_whole_budget(monkeypatch: pytest.MonkeyPatch, target: float) -> None:
    known(monkeypatch, fast=method())
    found = match("fast", PROBE, target, 10, {})
    every = [
        matching.flops_ratio(method().calibrate(PROBE, Parameters(keep=keep / 100)), PROBE, 10)
        for keep in range(1, 101)
    ]
    assert abs(found.flops_ratio - target) == min(abs(ratio - target) for ratio in every)
    assert found.parameters["fast"]["keep"] == pytest.approx(
        found.outcome.decisions.select[0].keep / 100, abs=0.006
    )


def test_what_cannot_be_reached_says_how_near_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, fast=method(), skip=skip(3))
    with pytest.raises(
        UserError, match=r"skip: 30% of the dense FLOPs is out of reach, the nearest is \d\d\.\d%"
    ):
        match("skip", PROBE, 0.3, 10, {})
    assert match("fast+skip", PROBE, 0.5, 10, {}).outcome.decisions.layers


def test_settings_that_a_method_refuses_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, fast=method(needs=0.4), never=method(needs=1.0))
    assert abs(match("fast", PROBE, 0.8, 10, {}).flops_ratio - 0.8) <= TOLERANCE
    with pytest.raises(UserError, match="never: nothing to keep"):
        match("never", PROBE, 0.8, 10, {})


def test_overrides_and_scoring_count(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, fast=method())
    found = match("fast", PROBE, 0.6, 10, {"fast": {"layer": 4}})
    assert found.outcome.decisions.select[0].layer == 4
    without_scores = mac2(resolve(found.outcome.decisions, SPEC), 10) / mac2(resolve(Decisions(), SPEC), 10)
    assert found.flops_ratio > without_scores


def test_a_method_without_at_share_runs_as_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = method()
    del fixed.at_share
    fixed.Parameters = Parameters
    known(monkeypatch, fixed=fixed, fast=method())
    assert matching.is_adjustable("fixed+fast") and not matching.is_adjustable("fixed")
    found = matching.as_published("fixed", PROBE, 10, {"fixed": {"keep": 0.25}})
    assert found.outcome.decisions.select[0].keep == 25 and found.parameters["fixed"]["layer"] == 2


def test_a_search_measures_only_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that a method reports costs nothing while its parameters are searched."""
    measured: list[Any] = []

    def sweep(what: str, *rest: Any) -> tuple[float | None, ...]:
        measured.append(what)
        return (3.0, 1.0, None)

    def calibrate(probe: Any, parameters: Parameters) -> Outcome:
        reported, read = probe.sweep(f"reported {parameters.keep}"), probe.sweep("read")
        assert min(value for value in read if value is not None) == 1 and len(read) == 3
        return Outcome(
            decisions=method().calibrate(probe, parameters).decisions, curves={"reported": reported}
        )

    known(
        monkeypatch, fast=SimpleNamespace(at_share=lambda share: Parameters(keep=share), calibrate=calibrate)
    )
    probe: Any = SimpleNamespace(spec=SPEC, sweep=sweep, scope="")
    found = match("fast", probe, 0.6, 10, {})
    assert set(measured) == {"read"}
    assert matching.measured_curves(found.outcome) == {}
    assert tuple(found.outcome.curves["reported"]) == (3.0, 1.0, None)  # measured now that it is read
    assert measured[-1] == f"reported {found.parameters['fast']['keep']}"
    assert matching.measured_curves(found.outcome) == {"reported": (3.0, 1.0, None)}


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_interval_holds_the_share(right: list[bool]) -> None:
    low, high = interval(right)
    assert 0 <= low <= sum(right) / len(right) <= high <= 1
    assert interval(right) == (low, high)  # seeded
    assert difference(right, right) == (0, 0)


def test_interval_against_the_normal_approximation() -> None:
    """400 questions, 70 % right: plus or minus 1.96 sqrt(pq/n) = 4.5 points."""
    low, high = interval([True] * 280 + [False] * 120)
    assert low == pytest.approx(0.7 - 0.0449, abs=0.006) and high == pytest.approx(0.7 + 0.0449, abs=0.006)


def test_pairing_narrows_the_difference() -> None:
    random = np.random.default_rng(0)
    base = random.random(500) < 0.8
    worse = base & (random.random(500) < 0.95)
    low, high = difference(worse.tolist(), base.tolist())
    (a, b), (c, d) = interval(worse.tolist()), interval(base.tolist())
    assert high - low < (b - a + d - c) / 2
    assert low < worse.mean() - base.mean() < high < 0


def point(
    name: str, target: float | None, accuracy: float, kinds: Sequence[str] = ("color", "count")
) -> Point:
    edges = (max(0.0, accuracy - 0.05), min(1.0, accuracy + 0.05))
    return Point(
        method=name, target=target, parameters={}, flops_ratio=target or 1.0, mean_visual_tokens=50,
        kv_bytes=10**6, accuracy=accuracy, interval=edges, against_dense=(-0.1, 0.0),
        by_kind={k: (accuracy, edges) for k in kinds}, first_token=0.02,
    )  # fmt: skip


def test_report_orders_by_target_then_accuracy() -> None:
    points = (point("dense", None, 0.99), point("a", 0.55, 0.7), point("b", 0.55, 0.9), point("a", 0.3, 0.95))
    result = Comparison(
        questions=100, calibration_samples=20, text=10, targets=(0.55, 0.3), points=points,
        out_of_reach={"b-30": "b: 30% of the dense FLOPs is out of reach"}, machine={},
    )  # fmt: skip
    text = as_markdown(result)
    first = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:6]
    assert first == ["dense", "b", "a", "a"]
    assert "| b | 55% | 55.0 | 50.0 | 1.00 | 20.0 | 90.0 | 85.0 to 95.0 | -10.0 to 0.0 |" in text
    assert "* b-30: b: 30% of the dense FLOPs is out of reach" in text
    labels = [label.get_text() for label in accuracy_figure(result).legends[0].get_texts()]
    assert labels == ["dense", "a", "b"]
