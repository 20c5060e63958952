"""Tiles and a thumbnail, as transformers' GOT-OCR2 processor prepares images for InternVL."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimvlm.errors import UserError
from trimvlm.image_processing import Tiles
from trimvlm.images.geometry import cut
from trimvlm.images.levels import make_levels
from trimvlm.profile import Grid


def natural_grid(processing: Tiles, width: int, height: int) -> Grid:
    """See `trimvlm.images.natural_grid`."""
    rows, columns = arrangement(processing, width, height)
    return rows * processing.tokens, columns * processing.tokens


profile_grid = natural_grid


def fit(processing: Tiles, image: Image.Image, grid: Grid) -> Image.Image:
    """Stretched, as all images here are."""
    rows, columns = _tiles(processing, grid)
    size = (columns * processing.view, rows * processing.view)
    return image.resize(size, Image.Resampling(processing.resample))


def shape(processing: Tiles, grid: Grid | None) -> tuple[int, ...]:
    """Shape of the pixels, [views, 3, view, view]."""
    rows, columns = _tiles(processing, grid)
    return (rows * columns + (rows * columns > 1), 3, processing.view, processing.view)


def make(processing: Tiles, grid: Grid | None) -> Callable[[Image.Image], NDArray[np.float32]]:
    """Resolves the options into a function from an RGB image to float32 [views, 3, view, view]: the tiles row
    by row, then the thumbnail."""
    rows, columns = _tiles(processing, grid)
    levels, view, resample = make_levels(processing), processing.view, Image.Resampling(processing.resample)

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        views = cut(image.resize((columns * view, rows * view), resample), view)
        if len(views) > 1:
            thumbnail = np.asarray(image.resize((view, view), resample))
            views = np.concatenate([views, thumbnail[None]])
        return levels(views)

    return preprocess


def token_side(processing: Tiles) -> float:
    """Pixels at each side of a visual token."""
    return processing.view / processing.tokens


def arrangement(processing: Tiles, width: int, height: int) -> Grid:
    """Rows and columns of tiles, by the image's aspect ratio; of equal ones the larger, as long as it does
    not show the image at more than twice its area (`get_optimal_tiled_canvas`)."""
    best, least = (1, 1), float("inf")
    for rows, columns in _arrangements(processing.least, processing.most):
        difference = abs(width / height - columns / rows)
        large = width * height > 0.5 * processing.view * processing.view * columns * rows
        if difference < least or (difference == least and large):
            best, least = (rows, columns), difference
    return best


def _arrangements(least: int, most: int) -> list[Grid]:
    """Few tiles first, then few columns."""
    side = range(1, most + 1)
    found = [(rows, columns) for columns in side for rows in side if least <= rows * columns <= most]
    return sorted(found, key=lambda each: each[0] * each[1])


def _tiles(processing: Tiles, grid: Grid | None) -> Grid:
    """Rows and columns of the tiles of a grid; without one, the whole image is a single tile.

    Raises:
        UserError: no image comes to it.
    """
    if grid is None:
        return 1, 1
    rows, columns = (tokens // processing.tokens for tokens in grid)
    view = processing.view
    if rows < 1 or columns < 1 or natural_grid(processing, columns * view, rows * view) != grid:
        allowed = f"{processing.least} to {processing.most}" if processing.most > 1 else "1"
        tile = f"{processing.tokens}x{processing.tokens}"
        raise UserError(
            f"grid {grid[0]}x{grid[1]}: images here are {allowed} tiles of {tile} visual tokens each"
        )
    return rows, columns
