"""The demo's pictures, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from trimvlm_calib import curves
from trimvlm_tools.demo.pipeline import DemoResult, MethodResult

FADE = 0.85  # how far a dropped patch fades to white


def survivor_figure(result: DemoResult) -> Figure:
    """One row per method that drops tokens: the image with the patches alive in each run of layers."""
    results = [method for method in result.methods if len(method.stages) > 1]
    with Image.open(result.example) as opened:
        image = opened.convert("RGB")
    columns = max(len(result.stages) for result in results)
    figure = Figure(figsize=(1.75 * columns + 1.2, 1.85 * len(results)), layout="constrained")
    figure.suptitle(result.question, fontsize=10)
    axes = figure.subplots(len(results), columns, squeeze=False)
    for line, method in zip(axes, results, strict=True):
        for axis, stage in zip(line, [*method.stages, *[None] * (columns - len(method.stages))], strict=True):
            axis.set_axis_off()
            if stage is not None:
                where, rows = stage
                axis.imshow(faded(image, rows, method.profile.model.visual_tokens))
                axis.set_title(f"{where}\n{len(rows)} tokens", fontsize=7)
        line[0].text(
            -0.12, 0.5, method.profile.name, transform=line[0].transAxes, rotation=90, va="center", fontsize=9
        )
    return figure


def faded(image: Image.Image, rows: Sequence[int], visual_tokens: int) -> np.ndarray:
    """The image, float [H, W, 3] of 0..1, with the patches that are not in `rows` faded to white."""
    side = round(visual_tokens**0.5)
    alive = np.zeros(side * side)
    alive[list(rows)] = 1
    pixels = np.asarray(image.resize((side * 16, side * 16)), dtype=np.float64) / 255
    weight = np.kron(alive.reshape(side, side), np.ones((16, 16)))[:, :, None]
    return pixels * weight + (pixels * (1 - FADE) + FADE) * (1 - weight)


def accuracy_figure(result: DemoResult) -> Figure:
    """Exact match against FLOPs, one point per method."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axis = figure.subplots()
    sides = (("left", (4, 5)), ("right", (-2, -13)))  # neighbours on different sides
    text: Any = {"textcoords": "offset points", "fontsize": 8}
    ordered = sorted(result.methods, key=lambda method: method.flops_ratio)
    for number, method in enumerate(ordered):
        x, y = 100 * method.flops_ratio, 100 * method.measured.exact_match
        side, offset = sides[number % 2]
        axis.plot(x, y, "o", color="tab:blue" if method.profile.name == "dense" else "tab:orange")
        axis.annotate(method.profile.name, (x, y), xytext=offset, ha=side, **text)
    axis.set_xlabel("prefill FLOPs, % of dense (MAC2)")
    axis.set_ylabel("exact match, %")
    axis.set_xlim(0, 112)
    axis.set_ylim(0, 105)
    axis.grid(alpha=0.3)
    return figure


def curve_figure(result: MethodResult) -> Figure | None:
    """The calibration curves of one method, or None if it measured none."""
    return curves.curve_figure(result.profile)
