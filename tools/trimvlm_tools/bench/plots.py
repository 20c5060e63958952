"""Plots of a geometry's report as PNG: roofline, growth with visual tokens, steps to the first token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools.bench.decisions import DENSE
from trimvlm_tools.bench.decoding import DecoderFigures, Reached
from trimvlm_tools.bench.peaks import Peaks
from trimvlm_tools.bench.points import PointFigures
from trimvlm_tools.bench.report import Report

_STEPS = {"preprocess": "#9ecae1", "vision": "#3182bd", "select": "#756bb1", "prefill": "#31a354"}
_OTHER, _PEER = "#d9d9d9", "#fdae6b"


def draw(report: Report, directory: Path) -> list[Path]:
    """Writes what the report has figures for; existing files are replaced.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("--plot: matplotlib is not installed; pip install trimvlm[tools]") from None
    mpl.use("Agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    directory.mkdir(parents=True, exist_ok=True)
    figures = {}
    for point in report.points:
        if point.peaks:
            figures[f"roofline-{point.point.name}"] = roofline(report, point, point.peaks)
    if len({point.point.visual for point in report.points}) > 1:
        figures["growth"] = growth(report)
    if report.answers:
        figures["first-token"] = first_token(report)
    written = []
    for name, figure in figures.items():
        path = directory / f"{report.geometry}-{report.precision}-{name}.png"
        figure.savefig(path, dpi=130)
        written.append(path)
    return written


def roofline(report: Report, point: PointFigures, peaks: Peaks) -> Any:
    """Work per byte against FLOP/s, and beside it how much of what the roof allows was reached."""
    import numpy as np
    from matplotlib.figure import Figure

    height = max(4.2, 1.4 + 0.3 * len(point.contenders))
    figure = Figure(figsize=(11.5, height), layout="constrained")
    roof, bars = figure.subplots(1, 2, width_ratios=(1.35, 1))
    colours = _colours(point.contenders)
    kinds = {"prefill": ("o", "prefill_reached"), "decode": ("^", "decode_reached")}
    intensities = []
    for each in point.contenders:
        for marker, field in kinds.values():
            reached: Reached | None = getattr(each, field)
            if reached:
                intensity = reached.flops / reached.bytes
                intensities.append(intensity)
                roof.plot(
                    intensity,
                    reached.flops_per_second,
                    marker,
                    color=colours[each.name],
                    markeredgecolor="black" if each.name == DENSE else "white",
                    markeredgewidth=0.8,
                    markersize=8,
                )
    x = np.geomspace(min(intensities) / 2, max(*intensities, peaks.flops / peaks.read) * 2, 100)
    roof.plot(x, np.minimum(peaks.flops, x * peaks.read), color="black", linewidth=1)
    roof.set(xscale="log", yscale="log", xlabel="FLOPs per byte of weights and KV", ylabel="FLOP/s")
    roof.set_title(
        f"measured peaks: {peaks.flops / 1e9:.0f} GFLOP/s, {peaks.read / 1e9:.1f} GB/s read",
        fontsize=9,
        loc="left",
    )
    for kind, (marker, _) in kinds.items():
        roof.plot([], [], marker, color="grey", label=kind)
    roof.legend(loc="lower right", frameon=False)
    roof.grid(alpha=0.25, which="both")
    _reached_bars(bars, point, colours)
    figure.suptitle(_title(report, f"{point.point.visual} visual, {point.point.text} text rows"), fontsize=10)
    return figure


def growth(report: Report) -> Any:
    """Prefill time and peak memory against visual rows, a row of panels for each number of text rows."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    texts = sorted({point.point.text for point in report.points})
    figure = Figure(figsize=(11, 0.6 + 3.8 * len(texts)), layout="constrained")
    grid = figure.subplots(len(texts), 2, squeeze=False)
    colours = _colours([each for point in report.points for each in point.contenders])
    for (time, memory), text in zip(grid, texts, strict=True):
        points = sorted(
            (point for point in report.points if point.point.text == text), key=lambda p: p.point.visual
        )
        for name in colours:
            found = [
                (point.point.visual, each)
                for point in points
                for each in point.contenders
                if each.name == name
            ]
            if not found:
                continue
            style: dict[str, Any] = _style(found[0][1], colours[name])
            rows = [visual for visual, _ in found]
            time.plot(rows, [each.prefill.median for _, each in found], label=name, **style)
            held = [(visual, each.memory.used.peak / 1e9) for visual, each in found if each.memory]
            if held:
                memory.plot(*zip(*held, strict=True), label=name, **style)
        for axes, label in ((time, "prefill, s"), (memory, "peak resident memory, GB")):
            ticks = [point.point.visual for point in points]
            axes.set(xscale="log", xlabel="visual rows", ylabel=label, xticks=ticks)
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.grid(alpha=0.25)
            axes.set_title(f"{text} text rows", fontsize=9, loc="left")
        time.set_yscale("log")
        memory.set_ylim(bottom=0)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(_title(report, "growth with visual tokens"), fontsize=10)
    return figure


def first_token(report: Report) -> Any:
    """Bars of the time to the first token by its steps; of peers the whole alone is known."""
    from matplotlib.figure import Figure

    answers = report.answers
    assert answers
    labels = [f"{each.profile}, {answers.kept[each.profile]} tokens" for each in answers.ours]
    labels += [
        each.peer if each.keep is None else f"{each.peer}, {each.keep} tokens" for each in answers.peers
    ]
    figure = Figure(figsize=(9, 1.9 + 0.34 * len(labels)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(answers.ours)
    for step, colour in _STEPS.items():
        parts = [getattr(each, step) for each in answers.ours]
        widths = [part.median if part else 0.0 for part in parts]
        axes.barh(range(len(left)), widths, left=left, color=colour, label=step)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    rest = [max(0.0, each.first_token.median - a) for a, each in zip(left, answers.ours, strict=True)]
    axes.barh(range(len(left)), rest, left=left, color=_OTHER, label="other host time")
    whole = [each.first_token.median for each in answers.peers]
    places = range(len(left), len(labels))
    if whole:
        axes.barh(places, whole, color=_PEER, label="peer, not split")
    totals = [each.first_token.median for each in answers.ours] + whole
    for place, total in enumerate(totals):
        axes.text(total, place, f" {total:.3g} s", va="center")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="seconds", xlim=(0, 1.12 * max(totals)))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    axes.set_title(_title(report, f"time to first token, {answers.visual} visual tokens"), fontsize=10)
    return figure


def _reached_bars(axes: Any, point: PointFigures, colours: dict[str, Any]) -> None:
    names = [each.name for each in point.contenders]
    for offset, field, alpha, label in (
        (-0.2, "prefill_reached", 1.0, "prefill"),
        (0.2, "decode_reached", 0.45, "decode"),
    ):
        shares = [_of_roof(getattr(each, field)) for each in point.contenders]
        places = [index + offset for index in range(len(names))]
        axes.barh(places, shares, 0.38, color=[colours[name] for name in names], alpha=alpha)
        for place, share in zip(places, shares, strict=True):
            axes.text(share, place, f" {share:.0f} % {label}" if share else "", va="center", fontsize=7)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="% of what the roof allows")
    axes.set_xlim(0, max(110, axes.get_xlim()[1] * 1.15))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.invert_yaxis()


def _of_roof(reached: Reached | None) -> float:
    """Per cent of the speed that the roofline allows, layer by layer."""
    if reached is None or reached.roofline_seconds is None:
        return 0.0
    return 100 * reached.roofline_seconds / reached.seconds


def _style(each: DecoderFigures, colour: Any) -> dict[str, Any]:
    if each.name == DENSE:
        return {"color": colour, "marker": "o", "linewidth": 2.5}
    if each.kind == "peer":
        return {"color": colour, "marker": "s", "linestyle": "--", "linewidth": 1.2, "markersize": 4}
    return {"color": colour, "marker": "o", "linewidth": 1.3, "markersize": 4}


def _colours(contenders: Sequence[DecoderFigures]) -> dict[str, Any]:
    """By name, in order: dense is black, peers are of another palette than ours."""
    from matplotlib import colormaps

    own, peers = colormaps["tab10"], colormaps["Dark2"]
    kinds = {each.name: each.kind for each in contenders}
    ours = [name for name, kind in kinds.items() if kind == "own" and name != DENSE]
    theirs = [name for name, kind in kinds.items() if kind == "peer"]
    found = {name: own(index % 10) for index, name in enumerate(ours)}
    found |= {name: peers(index % 8) for index, name in enumerate(theirs)}
    return {name: found.get(name, "black") for name in kinds}


def _title(report: Report, what: str) -> str:
    machine = report.machine.cpu or "unknown processor"
    noisy = "" if report.quiet else ", NOT QUIET"
    threads = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    return f"{report.geometry}, {report.precision}: {what} ({machine}, {threads}{noisy})"
