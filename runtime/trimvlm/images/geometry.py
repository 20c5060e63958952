"""Images put in the middle of larger ones, and cut into tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Pads an image to a square, itself in the middle (transformers' `pad_to_square`)."""
    side = max(image.size)
    return _in_the_middle(image, (side, side), colour)


def letterbox(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The image as large as fits into (width, height) pixels, its shape kept, and black around it."""
    scale = min(want / have for want, have in zip(size, image.size, strict=True))
    width, height = (
        min(want, max(1, round(have * scale))) for want, have in zip(size, image.size, strict=True)
    )
    return _in_the_middle(image.resize((width, height), Image.Resampling(resample)), size, (0, 0, 0))


def _in_the_middle(image: Image.Image, size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    if image.size == size:
        return image
    whole = Image.new("RGB", size, colour)
    whole.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return whole


def cut(image: Image.Image, view: int) -> NDArray[np.uint8]:
    """Tiles uint8 [rows * columns, view, view, 3] of an image of whole tiles, row by row."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // view, pixels.shape[1] // view
    return pixels.reshape(rows, view, columns, view, 3).swapaxes(1, 2).reshape(-1, view, view, 3)
