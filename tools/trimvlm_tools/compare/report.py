"""What a comparison shows: tables in Markdown, and accuracy against FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from trimvlm_tools.compare.pipeline import Comparison, Point

MARKS = "osD^v<>PX*hd"


def as_markdown(result: Comparison) -> str:
    """One table of all points, one of accuracy by kind of question, and what was out of reach."""
    lines = _table(
        (
            "method", "target", "FLOPs %", "visual tokens", "KV MB", "first token ms", "exact match %",
            "95 % interval", "to dense, points",
        ),
        [
            (
                point.method,
                "-" if point.target is None else f"{point.target:.0%}",
                f"{100 * point.flops_ratio:.1f}",
                f"{point.mean_visual_tokens:.1f}",
                f"{point.kv_bytes / 1e6:.2f}",
                f"{1e3 * point.first_token:.1f}",
                f"{100 * point.accuracy:.1f}",
                _percent(point.interval),
                _percent(point.against_dense),
            )
            for point in _ordered(result.points)
        ],
    )  # fmt: skip
    kinds = sorted(result.points[0].by_kind)
    lines += ["", "Exact match in % by kind of question:", ""]
    lines += _table(
        ("method", "target", *kinds),
        [
            (
                point.method,
                "-" if point.target is None else f"{point.target:.0%}",
                *(
                    f"{100 * point.by_kind[kind][0]:.0f} ({_percent(point.by_kind[kind][1], 0)})"
                    for kind in kinds
                ),
            )
            for point in _ordered(result.points)
        ],
    )
    if result.out_of_reach:
        lines += ["", "Out of reach:", ""]
        lines += [f"* {label}: {reason}" for label, reason in result.out_of_reach.items()]
    return "\n".join(lines) + "\n"


def accuracy_figure(result: Comparison) -> Figure:
    """Accuracy with its interval against FLOPs: a line per method, dense as a band."""
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    axis = figure.subplots()
    dense, *others = result.points
    low, high = (100 * edge for edge in dense.interval)
    axis.axhspan(low, high, color="0.85", label="dense")
    methods = list(dict.fromkeys(point.method for point in others))
    colours: Any = colormaps["tab20"]
    for number, method in enumerate(methods):
        points = sorted((p for p in others if p.method == method), key=lambda p: p.flops_ratio)
        x = [100 * point.flops_ratio for point in points]
        y = [100 * point.accuracy for point in points]
        below = [v - 100 * p.interval[0] for v, p in zip(y, points, strict=True)]
        above = [100 * p.interval[1] - v for v, p in zip(y, points, strict=True)]
        axis.errorbar(
            x, y, (below, above), marker=MARKS[number % len(MARKS)], color=colours(number % 20), markersize=5,
            linewidth=1, capsize=2, elinewidth=0.7, label=method,
        )  # fmt: skip
    axis.set_xlabel("prefill FLOPs, % of dense (MAC2, scoring included)")
    axis.set_ylabel(f"exact match on {result.questions} questions, %")
    axis.set_xlim(left=0)
    axis.set_ylim(0, 102)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def _ordered(points: Sequence[Point]) -> list[Point]:
    """Dense, then target by target, the most accurate first."""
    return sorted(points, key=lambda p: (-(2.0 if p.target is None else p.target), -p.accuracy, p.method))


def _percent(edges: tuple[float, float], digits: int = 1) -> str:
    return " to ".join(f"{100 * edge + 0.0:.{digits}f}" for edge in edges)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
