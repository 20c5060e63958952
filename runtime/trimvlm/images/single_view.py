"""One view of a fixed size, step by step as transformers' CLIP, SigLIP and LLaVA processors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimvlm.errors import UserError
from trimvlm.image_processing import SingleView
from trimvlm.images.geometry import square
from trimvlm.images.levels import make_levels, mean_colour
from trimvlm.profile import Grid

MOST_PIXELS = 90_000_000  # after resizing; Pillow's own limit for a decoded image


def natural_grid(processing: SingleView, width: int, height: int) -> None:
    """There are no grids here."""
    return None


profile_grid = natural_grid


def fit(processing: SingleView, image: Image.Image, grid: Grid) -> Image.Image:
    """Refuses."""
    raise _no_grid(grid)


def shape(processing: SingleView, grid: Grid | None) -> tuple[int, ...]:
    """Shape of the pixels, [1, 3, H, W]."""
    size = processing.crop or processing.resize
    if grid is not None:
        raise _no_grid(grid)
    if not isinstance(size, tuple):
        raise UserError(f"images: resize {size} without a crop makes several sizes; export the bundle again")
    return (1, 3, *size)


def make(processing: SingleView, grid: Grid | None) -> Callable[[Image.Image], NDArray[np.float32]]:
    """Resolves the options into a function from an RGB image to float32 [1, 3, H, W]."""
    shape(processing, grid)
    levels, colour = make_levels(processing), mean_colour(processing)

    def preprocess(image: Image.Image) -> NDArray[np.float32]:
        if processing.square:
            _check(max(image.size), max(image.size), image)
            image = square(image, colour)
        if processing.resize is not None:
            height, width = resized(image.height, image.width, processing.resize)
            _check(height, width, image)
            image = image.resize((width, height), resample=Image.Resampling(processing.resample))
        pixels_HWC = np.asarray(image)
        if processing.crop is not None:
            pixels_HWC = centre_crop(pixels_HWC, processing.crop)
        return levels(pixels_HWC[None])

    return preprocess


def resized(height: int, width: int, resize: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width after resizing: exact, or the shortest edge given and the aspect ratio kept."""
    if isinstance(resize, tuple):
        return resize
    if width <= height:
        return int(resize * height / width), resize
    return resize, int(resize * width / height)


def centre_crop(pixels_HWC: NDArray[np.uint8], crop: tuple[int, int]) -> NDArray[np.uint8]:
    """Cuts the centre out; where the image is smaller than the crop, it is padded with zeros first."""
    for axis, wanted in enumerate(crop):
        have = pixels_HWC.shape[axis]
        if have < wanted:
            before = (wanted - have + 1) // 2
            padding = [(0, 0)] * 3
            padding[axis] = (before, wanted - have - before)
            pixels_HWC = np.pad(pixels_HWC, padding)
        start = (pixels_HWC.shape[axis] - wanted) // 2
        pixels_HWC = pixels_HWC.take(np.arange(start, start + wanted), axis=axis)
    return pixels_HWC


def _check(height: int, width: int, image: Image.Image) -> None:
    """Refuses what would fill the memory."""
    if height * width > MOST_PIXELS:
        raise UserError(
            f"image of {image.width} x {image.height} pixels is too narrow: resizing or padding it would "
            f"make {width} x {height}; crop it first"
        )


def _no_grid(grid: Grid) -> UserError:
    rows, columns = grid
    return UserError(
        f"grid {rows}x{columns}: every image is one view of a fixed size here; leave the grid out"
    )
