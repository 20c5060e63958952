"""From 0..255 to what a vision tower is fed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trimvlm.image_processing import ImageProcessing


def make_levels(processing: ImageProcessing) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Resolves rescaling and normalising into a function: uint8 [I, H, W, 3] to float32 [I, 3, H, W]."""
    # A pixel has 256 values: the arithmetic of rescaling and normalising (in float64, then float32, as
    # transformers does it) is a table look-up.
    levels_256 = (np.arange(256, dtype=np.float64) * processing.rescale).astype(np.float32)
    mean_C1 = np.array(processing.mean, np.float32)[:, None]
    std_C1 = np.array(processing.std, np.float32)[:, None]
    table_C256 = (levels_256 - mean_C1) / std_C1

    def levels(pixels_IHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([table[pixels_IHWC[..., c]] for c, table in enumerate(table_C256)], axis=1)

    return levels


def mean_colour(processing: ImageProcessing) -> tuple[int, int, int]:
    """The colour that is nothing after normalising, in 0..255."""
    red, green, blue = (int(mean * 255) for mean in processing.mean)
    return red, green, blue
