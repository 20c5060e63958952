"""Image preprocessing with Pillow and numpy: from a user's file to the vision graph's input.

Follows transformers' CLIP image processor step by step (its Pillow backend, which is what `AutoProcessor`
gives where torchvision is not installed; the torchvision backend resizes on tensors and may differ by one
level per pixel): to RGB, resize, centre crop with zero padding, rescale, normalise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trimvlm.errors import UserError
from trimvlm.image_processing import ImageProcessing
from trimvlm.profile import Grid

ImageSource: TypeAlias = "Image.Image | Path | str | bytes"

MOST_PIXELS = 90_000_000  # after resizing; Pillow's own limit for a decoded image


def make_preprocessor(
    processing: ImageProcessing, grid: Grid | None = None
) -> Callable[[ImageSource], NDArray[np.float32]]:
    """Resolves the options once into a plain function.

    Returns:
        A function from an image (a file's path or bytes, or a Pillow image) to float32 pixels of that one
        image, as the vision graph takes them: [1, 3, H, W]. It raises UserError, naming the file, for an
        image that cannot be read.
    """
    # A pixel has 256 values: the arithmetic of rescaling and normalising (in float64, then float32, as
    # transformers does it) is a table look-up.
    levels_256 = (np.arange(256, dtype=np.float64) * processing.rescale).astype(np.float32)
    mean_C1 = np.array(processing.mean, np.float32)[:, None]
    std_C1 = np.array(processing.std, np.float32)[:, None]
    table_C256 = (levels_256 - mean_C1) / std_C1

    def preprocess(image: ImageSource) -> NDArray[np.float32]:
        rgb = flatten(image if isinstance(image, Image.Image) else read_rgb(image))
        if processing.resize is not None:
            height, width = resized(rgb.height, rgb.width, processing.resize)
            if height * width > MOST_PIXELS:
                raise UserError(
                    f"image of {rgb.width} x {rgb.height} pixels is too narrow: its short edge at "
                    f"{min(height, width)} would make {width} x {height}; crop it first"
                )
            rgb = rgb.resize((width, height), resample=Image.Resampling(processing.resample))
        pixels_HWC = np.asarray(rgb)
        if processing.crop is not None:
            pixels_HWC = centre_crop(pixels_HWC, processing.crop)
        return np.stack([table[pixels_HWC[..., c]] for c, table in enumerate(table_C256)])[None]

    return preprocess


def pixel_shape(processing: ImageProcessing, grid: Grid | None = None) -> tuple[int, ...]:
    """Shape of one image's pixels.

    Raises:
        UserError: a grid for a processing without grids, or images of several sizes.
    """
    size = processing.crop or processing.resize
    if grid is not None or not isinstance(size, tuple):
        raise UserError(f"grid {grid}: every image is one view of a fixed size here; leave the grid out")
    return (1, 3, *size)


def pixel_std(processing: ImageProcessing) -> NDArray[np.float32]:
    """What differences of pixels are multiplied by to be fractions of full brightness; broadcasts."""
    return np.array(processing.std, np.float32)[:, None, None]


def read_rgb(source: Path | str | bytes) -> Image.Image:
    """Opens a file as transformers' `load_image` does: turned upright by its EXIF tag, then RGB.

    An alpha channel is dropped (a transparent palette entry is not: it stays with the image as the RGB value
    that `flatten` takes for transparent), 16-bit and CMYK images are converted as Pillow does; of an
    animation the first frame is taken.

    Raises:
        UserError: no such file, or not an image that Pillow can read; names the file.
    """
    name = f"image of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise UserError(f"{name}: no such image file; give the path of a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; whether they open is what counts
            with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # noqa: BLE001 Pillow's decoders raise anything on damaged files
        raise _unreadable(name, error) from None


def flatten(image: Image.Image) -> Image.Image:
    """A Pillow image to RGB as transformers' `convert_to_rgb` does: transparency over white, EXIF ignored.

    Raises:
        UserError: the image's data cannot be read.
    """
    try:
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # noqa: BLE001 as above: an opened file is decoded only here
        raise _unreadable(str(getattr(image, "filename", "")) or "image", error) from None


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


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{name}: cannot be read as an image ({reason}); give a whole PNG, JPEG or other picture"
    )
