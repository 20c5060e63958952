"""Image preprocessing with Pillow and numpy: from a user's file to the vision graph's input.

Follows transformers' image processors step by step (their Pillow backend, which is what `AutoProcessor` gives
where torchvision is not installed; the torchvision backend resizes on tensors and may differ by one level per
pixel). One file for each kind of processing in `trimvlm.image_processing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trimvlm.image_processing import AnyResolution, ImageProcessing, Patches, SingleView, Tiles
from trimvlm.images import any_resolution, patches, single_view, tiles
from trimvlm.images.read import ImageSource, flatten, read_rgb, to_rgb
from trimvlm.profile import Grid

__all__ = [
    "ImageSource",
    "fit",
    "flatten",
    "make_preprocessor",
    "natural_grid",
    "nearest_grid",
    "pixel_shape",
    "pixel_std",
    "profile_grid",
    "read_rgb",
    "to_rgb",
]

_KINDS: dict[type[ImageProcessing], ModuleType] = {
    SingleView: single_view,
    AnyResolution: any_resolution,
    Tiles: tiles,
    Patches: patches,
}


def make_preprocessor(
    processing: ImageProcessing, grid: Grid | None = None
) -> Callable[[ImageSource], NDArray[np.float32]]:
    """Resolves the options once into a plain function.

    Args:
        grid: that every image gets; one which does not have it by nature is fitted, see `fit`. None: one view
            alone, where the processing has such.

    Returns:
        A function from an image (a file's path or bytes, or a Pillow image) to float32 pixels of that one
        image, as the vision graph takes them, of the shape `pixel_shape`. It raises UserError, naming the
        file, for an image that cannot be read.

    Raises:
        UserError: no image comes to this grid.
    """
    prepare = _KINDS[type(processing)].make(processing, grid)

    def preprocess(image: ImageSource) -> NDArray[np.float32]:
        rgb = to_rgb(image)
        return prepare(rgb if grid is None else fit(processing, rgb, grid))

    return preprocess


def natural_grid(processing: ImageProcessing, width: int, height: int) -> Grid | None:
    """The grid (see `trimvlm.profile.ModelSpec`) that transformers gives an image of this size in pixels.

    None where images have none, and where this one comes to its grid in another way than a profile for it.
    """
    return _KINDS[type(processing)].natural_grid(processing, width, height)


def profile_grid(processing: ImageProcessing, width: int, height: int) -> Grid | None:
    """The grid to make a profile for, where images of this size are to be shown to a model.

    Their natural one. Where they have none although images of this model have grids, one of as many tokens
    and their shape; they are fitted to it, see `fit`. None where images have no grids, or none of this shape
    has one.
    """
    return _KINDS[type(processing)].profile_grid(processing, width, height)


def nearest_grid(processing: ImageProcessing, grids: Sequence[Grid], width: int, height: int) -> Grid:
    """Which of `grids` an image gets: its natural one, else the nearest by aspect ratio and then by area.

    Args:
        grids: at least one.
    """
    natural = natural_grid(processing, width, height)
    if natural is not None and natural in grids:
        return natural
    tokens = width * height / _KINDS[type(processing)].token_side(processing) ** 2

    def distance(grid: Grid) -> tuple[float, float]:
        rows, columns = grid
        aspect, area = columns / rows / (width / height), rows * columns / tokens
        return abs(math.log(aspect)), abs(math.log(area))

    return min(grids, key=distance)


def fit(processing: ImageProcessing, image: Image.Image, grid: Grid) -> Image.Image:
    """An image whose natural grid is `grid`: itself where it is so; otherwise scaled and, where the
    processing keeps the shape of images, padded with black on both sides.

    transformers makes the same pixels of it as `make_preprocessor` of the original.

    Raises:
        UserError: no image comes to this grid.
    """
    if natural_grid(processing, *image.size) == grid:
        return image
    return _KINDS[type(processing)].fit(processing, image, grid)


def pixel_shape(processing: ImageProcessing, grid: Grid | None = None) -> tuple[int, ...]:
    """Shape of one image's pixels.

    Raises:
        UserError: no image comes to this grid.
    """
    return _KINDS[type(processing)].shape(processing, grid)


def pixel_std(processing: ImageProcessing) -> NDArray[np.float32]:
    """What differences of pixels are multiplied by to be fractions of full brightness; broadcasts."""
    std_C = np.array(processing.std, np.float32)
    if isinstance(processing, Patches):
        return std_C.repeat(processing.frames * processing.patch**2)
    return std_C[:, None, None]
