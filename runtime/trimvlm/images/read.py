"""Opening a user's image and flattening it to RGB, as transformers does."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageOps

from trimvlm.errors import UserError

ImageSource: TypeAlias = "Image.Image | Path | str | bytes"


def to_rgb(image: ImageSource) -> Image.Image:
    """An RGB image of whatever a user gives: a file's path or bytes, or a Pillow image.

    Raises:
        UserError: it cannot be read; names the file.
    """
    return flatten(image if isinstance(image, Image.Image) else read_rgb(image))


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


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{name}: cannot be read as an image ({reason}); give a whole PNG, JPEG or other picture"
    )
