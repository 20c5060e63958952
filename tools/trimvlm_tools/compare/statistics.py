"""Confidence intervals by bootstrap over questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def interval(right: Sequence[bool], *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the share of right answers (Efron; questions resampled).

    Args:
        right: one entry per question, at least one.
        level: share of resamples inside.
    """
    answers = np.asarray(right, dtype=np.float64)
    return _percentiles(answers, seed, level)


def difference(
    right: Sequence[bool], base: Sequence[bool], *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference in accuracy to `base` on the same questions (paired bootstrap)."""
    assert len(right) == len(base), "the same questions"
    return _percentiles(np.asarray(right, float) - np.asarray(base, float), seed, level)


def _percentiles(values: np.ndarray, seed: int, level: float) -> tuple[float, float]:
    drawn = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values[drawn].mean(axis=1), [tail, 100 - tail])
    return float(low), float(high)
