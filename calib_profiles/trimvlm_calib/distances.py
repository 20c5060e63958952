"""How far two vectors are apart: next-token distributions and rows of hidden states, in float64.

Shapes: V vocabulary, N rows, D width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Distance = Literal["full||pruned", "pruned||full", "cosine"]


def distance_of(full_V: np.ndarray, pruned_V: np.ndarray, distance: Distance) -> float:
    """Distance between the logits of the dense and of a pruned model.

    Args:
        distance: KL divergence in nats between the distributions, with the expectation under the one that is
            named first; `cosine`: 1 - cosine between the logits.
    """
    full, pruned = full_V.astype(np.float64), pruned_V.astype(np.float64)
    if distance == "cosine":
        cosine = float(full @ pruned / (np.linalg.norm(full) * np.linalg.norm(pruned)))
        return max(1.0 - cosine, 0.0)  # equal vectors may round to a little more than 1; NaN stays NaN
    p, q = _log_softmax(full), _log_softmax(pruned)
    if distance == "pruned||full":
        p, q = q, p
    return float((np.exp(p) * (p - q)).sum())


def mean_cosine(before_ND: np.ndarray, after_ND: np.ndarray) -> float:
    """Mean over rows of the cosine between the row in one array and in the other."""
    before, after = before_ND.astype(np.float64), after_ND.astype(np.float64)
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(((before * after).sum(axis=1) / norms).mean())


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())
