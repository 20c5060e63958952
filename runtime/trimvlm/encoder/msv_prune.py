"""MSV-Prune (SPIDER, section 3.1), made static and deterministic.

The paper leaves open how K-means starts and how long it runs, and its quotas (equation 2) need not add up to
the budget. Here: maximin start, a fixed number of Lloyd steps, the largest clusters absorb the difference.

Shapes: N patches, M of them no anchors, A anchors, K clusters, E width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.encoder.ranking import highest, others, unit
from trimvlm.encoder_rules import MsvPrune


def choose(rule: MsvPrune, keep: int, outputs: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """The chosen patches: anchors, then those of the clusters."""
    source = "received_attention" if rule.received else "cls_attention"
    attention_N = outputs[f"{source}.{rule.attention}"]
    anchors_A = highest(attention_N, int(keep * rule.anchors))
    rest_M = others(anchors_A, len(attention_N))
    missing = keep - len(anchors_A)
    if not missing:
        return anchors_A
    last_NE = outputs[f"features.{rule.last}"][-len(attention_N) :].astype(np.float32)
    middle_NE = outputs[f"features.{rule.middle}"][-len(attention_N) :]
    cluster_M = kmeans(last_NE[rest_M], rule.clusters, rule.iterations)
    quota_K = quotas(np.bincount(cluster_M, minlength=rule.clusters), missing)
    score_M = likeness(unit(last_NE[rest_M]), unit(middle_NE[rest_M]), unit(last_NE[anchors_A]), cluster_M)
    chosen = [
        members[highest(-score_M[members], quota)]
        for cluster, quota in enumerate(quota_K)
        for members in [np.flatnonzero(cluster_M == cluster)]
    ]
    return np.concatenate([anchors_A, rest_M[np.concatenate(chosen)]])


def kmeans(rows_ME: NDArray[np.float32], clusters: int, iterations: int) -> NDArray[np.int64]:
    """Cluster int64 [M] of each row, by Euclidean distance in float32.

    Starts at the row farthest from the mean, then at rows farthest from all starts so far. A Lloyd step puts
    each row to its nearest centre and moves the centres to their means; a centre without rows stays. The
    answer is each row's nearest centre after the last step. Ties: the lower index, of rows and of clusters.
    """
    # Around their mean: products then lose little, and distances come from one matrix product.
    rows_ME = rows_ME - rows_ME.mean(axis=0)
    square_M = np.square(rows_ME).sum(axis=1)
    starts = [int(np.argmax(square_M))]
    nearest_M = np.full(len(rows_ME), np.inf, np.float32)
    while len(starts) < clusters:
        away_M = square_M + square_M[starts[-1]] - 2 * (rows_ME @ rows_ME[starts[-1]])
        nearest_M = np.minimum(nearest_M, away_M)
        starts.append(int(np.argmax(nearest_M)))
    centres_KE = rows_ME[starts]
    for _ in range(iterations):
        is_in_KM = (np.arange(clusters)[:, None] == _nearest(rows_ME, centres_KE)).astype(np.float32)
        sizes_K = is_in_KM.sum(axis=1)
        means_KE = is_in_KM @ rows_ME / np.maximum(sizes_K, 1)[:, None]
        centres_KE = np.where(sizes_K[:, None] > 0, means_KE, centres_KE)
    return _nearest(rows_ME, centres_KE)


def quotas(sizes_K: NDArray[np.int64], total: int) -> list[int]:
    """How many tokens each cluster keeps; they add up to `total`, at most the number of tokens.

    Equation (2): in proportion to the size, rounded (halves to even), at least one. What that is off by the
    largest cluster absorbs, and where it would be left with none or more than it has, the next largest.
    Clusters without tokens get nothing.
    """
    whole = int(sizes_K.sum())
    quota_K = [max(1, round(total * size / whole)) if size else 0 for size in sizes_K.tolist()]
    for cluster in highest(sizes_K, len(sizes_K)):
        wanted = quota_K[cluster] + total - sum(quota_K)
        quota_K[cluster] = min(max(wanted, 1), int(sizes_K[cluster])) if sizes_K[cluster] else 0
    return quota_K


def likeness(
    last_ME: NDArray[np.float32],
    middle_ME: NDArray[np.float32],
    anchors_AE: NDArray[np.float32],
    cluster_M: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Mean of equation (3) over the other tokens of each token's cluster; lowest is kept.

    A token alone in its cluster scores 0. Rows have length one; without anchors their terms are 0.
    """
    anchored_M = (last_ME @ anchors_AE.T).max(axis=1) if len(anchors_AE) else np.zeros(len(last_ME), "f4")
    # Symmetric to the last bit: the two tokens of a cluster of two tie, and the lower index decides.
    pairs_MM = last_ME @ last_ME.T + middle_ME @ middle_ME.T + np.add.outer(anchored_M, anchored_M)
    pairs_MM *= cluster_M[:, None] == cluster_M
    np.fill_diagonal(pairs_MM, 0)
    partners_M = np.bincount(cluster_M)[cluster_M] - 1
    return pairs_MM.sum(axis=1) / np.maximum(partners_M, 1).astype(np.float32)


def _nearest(rows_ME: NDArray[np.float32], centres_KE: NDArray[np.float32]) -> NDArray[np.int64]:
    """Nearest centre of each row; |row|^2, the same for all centres, is left out of the distance."""
    return np.argmin(np.square(centres_KE).sum(axis=1) - 2 * (rows_ME @ centres_KE.T), axis=1)
