"""HiPrune (section 3): anchors of a middle layer with their neighbours, filled up by a deep layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.encoder.ranking import highest
from trimvlm.encoder_rules import HiPrune


def choose(rule: HiPrune, keep: int, outputs: Mapping[str, NDArray[Any]], columns: int) -> NDArray[np.int64]:
    """The chosen patches: anchors and neighbours first, both by falling attention of the deep layer.

    Neighbours are the patches before and after in raster order, which wraps across rows as published, and
    those above and below, all clamped to the image.
    """
    middle_N = outputs[f"received_attention.{rule.object_layer}"]
    deep_N = outputs[f"received_attention.{rule.deep_layer}"]
    patches = len(deep_N)
    anchors = highest(middle_N, round(keep * rule.alpha / 5))
    near = np.array([0, -1, 1, -columns, columns])
    marked_N = np.zeros(patches, bool)
    marked_N[np.clip(anchors[:, None] + near, 0, patches - 1)] = True
    # One ranking by mark, then attention: the sum of both in float32 would round the attention off.
    return np.lexsort((np.arange(patches), -deep_N, ~marked_N))[:keep].astype(np.int64)
