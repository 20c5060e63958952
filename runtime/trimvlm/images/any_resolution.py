"""A view of the whole image and tiles of a canvas, as transformers prepares it for LLaVA-NeXT and -OneVision.

A grid counts the tokens that are left when those of the canvas' padding are cut off ("unpad") and where
still too many are left, they are thinned out. Several canvases may come to one grid; it means the one with
the fewest tiles, then with the least padding, and an image that comes to the same grid on another canvas
does not have it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimvlm.errors import UserError
from trimvlm.image_processing import AnyResolution
from trimvlm.images.geometry import cut, letterbox, square
from trimvlm.images.levels import make_levels, mean_colour
from trimvlm.profile import Grid


class Layout(NamedTuple):
    """Where an image lies on its canvas: rows and columns of tiles, and of their tokens that it covers."""

    tiles: Grid
    covered: Grid


def natural_grid(processing: AnyResolution, width: int, height: int) -> Grid | None:
    """See `trimvlm.images.natural_grid`."""
    found = layout(processing, width, height)
    grid = _thinned(processing, found.covered)
    return grid if min(grid) > 0 and meant(processing, grid) == found else None


def profile_grid(processing: AnyResolution, width: int, height: int) -> Grid | None:
    """The tokens that transformers makes of the image, or of a smaller copy of it."""
    for size in range(64, 0, -1):
        smaller = max(1, width * size // 64), max(1, height * size // 64)
        grid = _thinned(processing, layout(processing, *smaller).covered)
        if min(grid) > 0 and meant(processing, grid):
            return grid
    return None


def fit(processing: AnyResolution, image: Image.Image, grid: Grid) -> Image.Image:
    """Letterboxed to the size at which it covers its part of the canvas unscaled."""
    return letterbox(image, _size(processing, _found(processing, grid)), processing.resample)


def shape(processing: AnyResolution, grid: Grid | None) -> tuple[int, ...]:
    """Shape of the pixels, [views, 3, view, view]."""
    rows, columns = (0, 0) if grid is None else _found(processing, grid).tiles
    return (1 + rows * columns, 3, processing.view, processing.view)


def make(processing: AnyResolution, grid: Grid | None) -> Callable[[Image.Image], NDArray[np.float32]]:
    """Resolves the options into a function from an RGB image of that grid to float32 [views, 3, view, view],
    the whole image first, then the tiles row by row."""
    levels, colour = make_levels(processing), mean_colour(processing)
    view, resample = processing.view, Image.Resampling(processing.resample)

    def whole(image: Image.Image) -> NDArray[np.uint8]:
        return np.asarray(image.resize((view, view), resample))[None]

    if grid is None:
        return lambda image: levels(whole(square(image, colour) if processing.square else image))
    rows, columns = _found(processing, grid).tiles
    canvas = (columns * view, rows * view)

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        placed = Image.new("RGB", canvas)
        inner = _scaled(image.size, canvas)
        corner = ((canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2)
        placed.paste(image.resize(inner, resample), corner)
        return levels(np.concatenate([whole(image), cut(placed, view)]))

    return preprocess


def token_side(processing: AnyResolution) -> float:
    """Pixels at each side of a visual token."""
    return processing.view / processing.tokens


def layout(processing: AnyResolution, width: int, height: int) -> Layout:
    """What transformers does with an image: `select_best_resolution`, then `unpad_image`, to its rounding."""

    def merit(canvas: Grid) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - canvas[0] * canvas[1]

    best = max(processing.canvases, key=merit)
    tiles = (best[0] // processing.view, best[1] // processing.view)
    rows, columns = (count * processing.tokens for count in tiles)
    if width / height > columns / rows:
        return Layout(tiles, (_covered(rows, height * (columns / width)), columns))
    return Layout(tiles, (rows, _covered(columns, width * (rows / height))))


@lru_cache(maxsize=256)
def meant(processing: AnyResolution, grid: Grid) -> Layout | None:
    """The layout that a grid means, or None where no image comes to it."""
    for candidate in _candidates(processing):
        if _thinned(processing, candidate.covered) == grid and (
            layout(processing, *_size(processing, candidate)) == candidate
        ):
            return candidate
    return None


def _candidates(processing: AnyResolution) -> Iterator[Layout]:
    """Tiles, and what an image may cover of them: few tiles first, then little padding, which is the
    same on both sides."""
    view, tokens = processing.view, processing.tokens
    tiles = [(height // view, width // view) for height, width in processing.canvases]
    for rows, columns in sorted(tiles, key=math.prod):
        height, width = rows * tokens, columns * tokens
        yield Layout((rows, columns), (height, width))
        yield from (Layout((rows, columns), (less, width)) for less in range(height - 2, 0, -2))
        yield from (Layout((rows, columns), (height, less)) for less in range(width - 2, 0, -2))


def _found(processing: AnyResolution, grid: Grid) -> Layout:
    found = meant(processing, grid)
    if found is None:
        raise UserError(
            f"grid {grid[0]}x{grid[1]}: no image comes to it in this model; take the grid of an image"
        )
    return found


def _size(processing: AnyResolution, of: Layout) -> tuple[int, int]:
    """(width, height) of the image that covers its part of the canvas unscaled."""
    height, width = (max(1, round(tokens * token_side(processing))) for tokens in of.covered)
    return width, height


def _covered(tokens: int, wanted: float) -> int:
    return tokens - (tokens - int(round(wanted, 7))) // 2 * 2


def _thinned(processing: AnyResolution, covered: Grid) -> Grid:
    """`pack_image_features` of transformers' LLaVA-OneVision."""
    if processing.most is None:
        return covered
    ratio = math.sqrt(covered[0] * covered[1] / (processing.most * processing.tokens**2))
    return (int(covered[0] // ratio), int(covered[1] // ratio)) if ratio > 1.1 else covered


def _scaled(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of an image on its canvas (`get_patch_output_size`)."""
    by_width, by_height = canvas[0] / size[0], canvas[1] / size[1]
    if by_width < by_height:
        return canvas[0], min(math.ceil(size[1] * by_width), canvas[1])
    return min(math.ceil(size[0] * by_height), canvas[0]), canvas[1]
