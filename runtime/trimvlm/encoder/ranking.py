"""Ranking without chance, and rows of length one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def highest(scores_N: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices int64 [count] of the highest scores, highest first; ties go to the lower index."""
    return np.argsort(-scores_N, kind="stable")[:count].astype(np.int64)


def others(chosen: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices 0..count - 1 that are not chosen, ascending."""
    left_N = np.ones(count, bool)
    left_N[chosen] = False
    return np.flatnonzero(left_N).astype(np.int64)


def unit(rows_NE: NDArray[Any], dtype: type[np.floating] = np.float32) -> NDArray[Any]:
    """Rows of Euclidean length one, computed in `dtype`; a row of zeros stays one."""
    rows_NE = rows_NE.astype(dtype)
    return rows_NE / np.maximum(np.linalg.norm(rows_NE, axis=-1, keepdims=True), dtype(1e-12))
