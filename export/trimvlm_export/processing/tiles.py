"""Tiles and a thumbnail: the processor of GOT-OCR2, which InternVL uses."""

from __future__ import annotations

from typing import Any

from trimvlm.image_processing import Tiles
from trimvlm_export.processing.source import Source

PROCESSORS = ("GotOcr2ImageProcessor",)

# InternVLProcessor asks for tiles whatever the image processor's own default, which is none.
OPTIONS: dict[str, Any] = {"crop_to_patches": True}


def freeze(source: Source) -> Tiles:
    """The options.

    Raises:
        UserError: tiles that are not square or not of the tower's size, or of other tokens than the
            processor writes.
    """
    images, vision = source.images, source.vision
    view = source.side(images.size)
    source.same("tiles of pixels", [view, view], _pair(vision.image_size))
    tokens = int(view // _pair(vision.patch_size)[0] * source.config.downsample_ratio)
    source.same("as image_seq_length of its processor", source.whole.image_seq_length, tokens**2)
    return Tiles(
        view=view,
        tokens=tokens,
        least=images.min_patches,
        most=images.max_patches,
        **source.levels(),
    )


def _pair(sides: Any) -> list[int]:
    return list(sides) if isinstance(sides, list | tuple) else [sides, sides]
