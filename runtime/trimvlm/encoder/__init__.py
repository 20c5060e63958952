"""The encoder stage on the device: from what the vision graph gives for one image to the rows that stay.

Numpy only: between two graphs, on at most a few hundred tokens. Scores are float32 or finer, ties go to the
lower index.

Shapes: N patches, S tower rows ([CLS] where there is one, then the patches), E width of a row, K rows kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trimvlm.encoder import hiprune, msv_prune, prumerge, visionzip, vispruner
from trimvlm.encoder.ranking import highest
from trimvlm.encoder_rules import EncoderStage, HiPrune, MsvPrune, PruMerge, VisionZip, VisPruner

Taps: TypeAlias = Mapping[str, NDArray[Any]]
Encode: TypeAlias = Callable[[Taps], tuple[NDArray[Any], NDArray[np.int64]]]


def make_encoder(stage: EncoderStage, patches: int, columns: int | None = None) -> Encode:
    """Resolves an encoder stage into a function.

    Args:
        stage: for one view of an image.
        patches: of one view, N.
        columns: of them in a row; None: as many as rows.

    Returns:
        `encode(outputs)`, from the vision graph's outputs for one view, without the leading axis of views
        (`tower` [S, E] and the taps of `encoder_rules.taps`), to the rows that stay, [K, E] in the dtype of
        `tower`, and the patches they stem from, int64, in the order of the rows. Rows come in spatial order,
        but for VisionZip ([CLS], then patches, then contextual rows) and PruMerge (by falling attention, then
        the row of the rest). [CLS] and the row of the rest stem from no single patch and are not listed.
    """
    rule, keep = stage.by, stage.keep
    if isinstance(rule, VisionZip):
        return lambda outputs: visionzip.merge(rule, keep, outputs)
    if isinstance(rule, PruMerge):
        return lambda outputs: prumerge.merge(rule, keep, outputs)
    if isinstance(rule, MsvPrune):
        return _gather(lambda outputs: msv_prune.choose(rule, keep, outputs), patches)
    if isinstance(rule, VisPruner):
        return _gather(lambda outputs: vispruner.choose(rule, keep, outputs), patches)
    if isinstance(rule, HiPrune):
        side = columns or isqrt(patches)
        return _gather(lambda outputs: hiprune.choose(rule, keep, outputs, side), patches)
    chosen = highest(np.random.default_rng(rule.seed).permutation(patches), keep)
    return _gather(lambda _: chosen, patches)


def _gather(choose: Callable[[Taps], NDArray[np.int64]], patches: int) -> Encode:
    """Rows of chosen patches, in spatial order."""

    def encode(outputs: Taps) -> tuple[NDArray[Any], NDArray[np.int64]]:
        chosen = np.sort(choose(outputs))
        tower_SE = outputs["tower"]
        return tower_SE[len(tower_SE) - patches :][chosen], chosen

    return encode
