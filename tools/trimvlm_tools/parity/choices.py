"""What an answer chose on its way: patches, selections, rows in skip mode, rows below a threshold.

Choices are named as the decoder graph's outputs (`selected.0`, `skipped.1`, `present_visible.0`), and
`patches.i` for what the encoder stage kept of image i, in the order in which one depends on another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimvlm.rules import ValueInfluence
from trimvlm.schedule import Schedule
from trimvlm_tools.parity.answer import Answer


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One choice among rows.

    Attributes:
        rows: numbers of the rows chosen.
        gap: how far the scores are from another choice: at the cut, or at a threshold before it. Infinite
            where no other choice is ever excused.
    """

    rows: tuple[int, ...]
    gap: float


def choices(answer: Answer, thresholds: Mapping[int, float]) -> dict[str, Choice]:
    """All choices of an answer.

    Args:
        thresholds: of those selections that have one, see `thresholds_of`.
    """
    found: dict[str, Choice] = {}
    gap = 0.0 if answer.patches_tie else np.inf
    for image, patches in enumerate(answer.patches):
        found[f"patches.{image}"] = Choice(rows=tuple(patches.tolist()), gap=gap)
    live, near = np.arange(len(answer.visual)), np.inf
    for stage, (rows, scores) in enumerate(zip(answer.selected, answer.scores, strict=True)):
        gap = min(score_gap(scores, len(rows)), near)
        found[f"selected.{stage}"] = Choice(rows=tuple(rows.tolist()), gap=gap)
        if stage in thresholds:
            distance = np.abs(scores[np.searchsorted(live, rows)] - thresholds[stage])
            near = min(near, float(distance.min(initial=np.inf)))
        if stage in answer.visible:
            shown = np.flatnonzero(answer.visible[stage])
            found[f"present_visible.{stage}"] = Choice(rows=tuple(shown.tolist()), gap=near)
        live = rows
    before = np.empty(0, np.int64)
    for stage, (rows, scores) in enumerate(zip(answer.skipped, answer.skip_scores, strict=True)):
        free = scores[~np.isin(live, before)]
        gap = min(score_gap(free, len(rows) - len(before)), near)
        found[f"skipped.{stage}"] = Choice(rows=tuple(rows.tolist()), gap=gap)
        before = rows
    return found


def thresholds_of(schedule: Schedule) -> dict[int, float]:
    """The thresholds of a Schedule's selections, by their number."""
    found = {}
    for stage, row in enumerate(schedule.stages):
        if row.select and isinstance(row.select.by, ValueInfluence) and row.select.by.threshold is not None:
            found[stage] = row.select.by.threshold
    return found


def score_gap(scores: NDArray, kept: int) -> float:
    """Distance between the lowest score that was kept and the highest that was not."""
    ranked = np.sort(scores)[::-1]
    return float(ranked[kept - 1] - ranked[kept]) if 0 < kept < len(ranked) else np.inf
