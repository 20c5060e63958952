"""Patches of an image of its own size, as transformers' Qwen2-VL processor."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimvlm.errors import UserError
from trimvlm.image_processing import Patches
from trimvlm.images.geometry import letterbox
from trimvlm.images.levels import make_levels
from trimvlm.profile import Grid

NARROWEST = 200  # longer edge to shorter; transformers refuses more


def natural_grid(processing: Patches, width: int, height: int) -> Grid | None:
    """See `trimvlm.images.natural_grid`; transformers' `smart_resize`."""
    if max(width, height) / min(width, height) > NARROWEST:
        return None
    side = processing.patch * processing.merge
    rows, columns = round(height / side), round(width / side)
    pixels = rows * side * columns * side
    if pixels > processing.most:
        shrink = math.sqrt((height * width) / processing.most)
        return max(1, math.floor(height / shrink / side)), max(1, math.floor(width / shrink / side))
    if pixels < processing.least:
        grow = math.sqrt(processing.least / (height * width))
        return math.ceil(height * grow / side), math.ceil(width * grow / side)
    return rows, columns


profile_grid = natural_grid


def fit(processing: Patches, image: Image.Image, grid: Grid) -> Image.Image:
    """Letterboxed to the grid's pixels."""
    return letterbox(image, _size(processing, grid), processing.resample)


def shape(processing: Patches, grid: Grid | None) -> tuple[int, ...]:
    """Shape of the pixels, [patches, 3 * frames * patch * patch]."""
    width, height = _size(processing, grid)
    area = processing.patch**2
    return (width * height // area, 3 * processing.frames * area)


def make(processing: Patches, grid: Grid | None) -> Callable[[Image.Image], NDArray[np.float32]]:
    """Resolves the options into a function from an RGB image to float32 pixels of the shape `shape`:
    the patches of a visual token follow each other, and the tokens row by row."""
    size, resample = _size(processing, grid), Image.Resampling(processing.resample)
    levels, patch, merge = make_levels(processing), processing.patch, processing.merge
    columns, rows = (pixels // (patch * merge) for pixels in size)

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        pixels = levels(np.asarray(image.resize(size, resample))[None])
        parts = pixels.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        frames = np.repeat(parts[:, :, :, :, :, None], processing.frames, axis=5)
        return frames.reshape(rows * columns * merge * merge, -1)

    return preprocess


def token_side(processing: Patches) -> float:
    """Pixels at each side of a visual token."""
    return processing.patch * processing.merge


def _size(processing: Patches, grid: Grid | None) -> tuple[int, int]:
    """(width, height) in pixels of a grid.

    Raises:
        UserError: no image comes to it.
    """
    side = processing.patch * processing.merge
    rows, columns = grid or (0, 0)
    if rows < 1 or columns < 1 or natural_grid(processing, columns * side, rows * side) != grid:
        said = "none" if grid is None else f"{rows}x{columns}"
        raise UserError(
            f"grid {said}: images here are {processing.least} to {processing.most} pixels, {side} x {side} "
            "of them a visual token"
        )
    return columns * side, rows * side
