"""What the figures are held to. A bar that was not measured is not a pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from trimvlm.value import Value
from trimvlm_tools.bench.answers import Answers
from trimvlm_tools.bench.decisions import DENSE, QUARTER
from trimvlm_tools.bench.decoding import DecoderFigures
from trimvlm_tools.bench.points import PointFigures
from trimvlm_tools.bench.session_memory import SessionMemory
from trimvlm_tools.bench.size import Size

ROOFLINE = {576: 1.05, 64: 1.10}  # by visual tokens
BANDWIDTH = {"fp32": 0.85, "int4": 0.70}
QUARTER_SPEED, OVER_FLOPS, PEAK, DISK = 2.5, 1.10, 1.3, 1.02
FIRST_HOST, STEP_HOST, RESIDENT, OPEN_SECONDS = 0.02, 0.03, 1.05, 2.0


class Bar(Value, frozen=True, kw_only=True):
    """One figure against what is asked of it; `measured` None: not measured."""

    what: str
    measured: float | None
    kind: Literal["at most", "at least"]
    bar: float
    verdict: Literal["pass", "MISSED", "not measured"]


def at_most(what: str, measured: float | None, bar: float) -> Bar:
    """A figure that should be small."""
    return _bar(what, measured, "at most", bar)


def at_least(what: str, measured: float | None, bar: float) -> Bar:
    """A figure that should be large."""
    return _bar(what, measured, "at least", bar)


def geometry_bars(
    name: str,
    precision: str,
    *,
    points: Sequence[PointFigures],
    answers: Answers | None,
    memory: SessionMemory | None,
    size: Size,
) -> tuple[Bar, ...]:
    """All bars of one geometry's figures."""
    bars: list[Bar] = []
    for each in points:
        bars += _dense(each, precision)
    for visual, bar in ROOFLINE.items():
        found = [each for each in points if each.point.visual == visual]
        bars += [_roofline(point, each, bar) for point in found for each in _pruned(point)] or [
            at_most(f"pruned prefill over roofline at {visual} visual tokens", None, bar)
        ]
    bars += [_first_token(name_, answers) for name_ in QUARTER]
    bars += _host(points, answers)
    bars += [
        at_most("weights resident / one copy, a session", memory and memory.weights_resident, RESIDENT),
        at_most(
            "weights resident / one copy, a choice of two",
            memory and memory.choice_weights_resident,
            RESIDENT,
        ),
        at_most("KV / the Schedule's prediction, worst", _worst_kv(points), 1.0),
        at_most("session: peak memory / weights", memory.peak_over_weights if memory else None, PEAK),
        at_most("bundle / checkpoint, on disk", size.over_checkpoint, DISK),
    ]
    if name == "onevision-0.5b":
        bars.append(
            at_most("session open, second time, s", memory.open_seconds if memory else None, OPEN_SECONDS)
        )
    if name == "d1024":
        bars += [
            at_most(f"{each.name}, {point.point.name}: time ratio / FLOPs ratio", each.over_flops, OVER_FLOPS)
            for point in points
            for each in _pruned(point)
        ]
    return tuple(bars)


def _dense(figures: PointFigures, precision: str) -> list[Bar]:
    at = f"{figures.point.name}, {precision}"
    (dense,) = (each for each in figures.contenders if each.name == DENSE)
    slower = _least(each.prefill_ratio.median for each in figures.of("peer"))
    steps = _least(each.decode_ratio.median for each in figures.of("peer") if each.decode_ratio)
    reached = None
    if figures.peaks and dense.decode_reached:
        reached = dense.decode_reached.bytes_per_second / figures.peaks.read
    return [
        at_most(f"dense prefill / fastest dense peer, {at}", None if slower is None else 1 / slower, 1.0),
        at_least(f"dense tokens/s / fastest dense peer, {at}", steps, 1.0),
        at_least(f"dense decode: bytes/s / read bandwidth, {at}", reached, BANDWIDTH[precision]),
    ]


def _roofline(figures: PointFigures, each: DecoderFigures, bar: float) -> Bar:
    return at_most(f"{each.name}, {figures.point.name}: time ratio / roofline ratio", each.over_roofline, bar)


def _first_token(name: str, answers: Answers | None) -> Bar:
    what = f"{name}: time to first token, fastest peer / ours"
    if answers is None or name not in answers.ratios:
        return at_least(what, None, QUARTER_SPEED)
    fastest = _least(each.ratio.median for each in answers.peers if each.keep in (None, answers.kept[name]))
    measured = None if fastest is None else fastest / answers.ratios[name].median
    return at_least(what, measured, QUARTER_SPEED)


def _host(points: Iterable[PointFigures], answers: Answers | None) -> list[Bar]:
    first = max((each.first_host_share for each in answers.ours), default=None) if answers else None
    steps = [
        split.decode_host.median / (split.decode_host.median + split.decode_graph.median)
        for point in points
        for each in point.of("own")
        if (split := each.split) and split.decode_host and split.decode_graph
    ]
    return [
        at_most("host time / time to first token, worst", first, FIRST_HOST),
        at_most("host time / decoded token, worst", max(steps, default=None), STEP_HOST),
    ]


def _pruned(figures: PointFigures) -> list[DecoderFigures]:
    return [each for each in figures.of("own") if each.name != DENSE]


def _worst_kv(points: Iterable[PointFigures]) -> float | None:
    ratios = [
        each.bytes.kv / each.bytes.kv_predicted for point in points for each in point.of("own") if each.bytes
    ]
    return max(ratios, default=None)


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _bar(what: str, measured: float | None, kind: Literal["at most", "at least"], bar: float) -> Bar:
    if measured is None:
        return Bar(what=what, measured=None, kind=kind, bar=bar, verdict="not measured")
    good = measured <= bar if kind == "at most" else measured >= bar
    return Bar(what=what, measured=measured, kind=kind, bar=bar, verdict="pass" if good else "MISSED")
