"""LLaVA-PruMerge (section 3) with a fixed ratio: kept tokens, each with its nearest others added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.encoder.ranking import highest, others, unit
from trimvlm.encoder_rules import PruMerge


def merge(
    rule: PruMerge, keep: int, outputs: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Rows [keep, E]: the most attended patches by falling attention, then one row of all the others.

    To each kept one the patches with the most similar keys (ties: the first; kept ones count too) are added,
    each times its attention; the last row is the same sum over all patches that are not kept. Neither is
    normalised, as in the published code.
    """
    attention_N = outputs[f"joint_attention.{rule.layer}"]
    patches = len(attention_N)
    tower_SE = outputs["tower"]
    weighted_NE = tower_SE[-patches:] * attention_N[:, None].astype(np.float32)
    keys_NE = unit(outputs[f"keys.{rule.layer}"].reshape(len(tower_SE), -1)[-patches:])
    chosen = highest(attention_N, keep - 1)
    alike_KN = keys_NE[chosen] @ keys_NE.T
    alike_KN[np.arange(len(chosen)), chosen] = -np.inf
    rows = tower_SE[-patches:][chosen].astype(np.float32)
    for row, alike_N in enumerate(alike_KN):
        rows[row] += weighted_NE[highest(alike_N, rule.neighbours)].sum(axis=0)
    rest = weighted_NE[others(chosen, patches)].sum(axis=0, keepdims=True)
    return np.concatenate([rows, rest]).astype(tower_SE.dtype), chosen
