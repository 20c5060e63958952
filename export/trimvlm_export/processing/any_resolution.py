"""A view of the whole image and tiles of a canvas: the processors of LLaVA-NeXT and LLaVA-OneVision."""

from __future__ import annotations

import re
from typing import Any

from trimvlm.image_processing import AnyResolution
from trimvlm_export.processing.source import Source

PROCESSORS = ("LlavaNextImageProcessor", "LlavaOnevisionImageProcessor")
OPTIONS: dict[str, Any] = {}


def freeze(source: Source) -> AnyResolution:
    """The options. Where the tokens of the tiles lie is the model's, which must choose tiles as the image
    processor does.

    Raises:
        UserError: views that are not square or not of the tower's size, tiles on which model and image
            processor differ, or a `vision_aspect_ratio` other than `anyres_max_N`.
    """
    images, vision = source.images, source.vision
    view = source.side(images.size)
    source.same("views of pixels", view, vision.image_size)
    canvases = tuple((int(height), int(width)) for height, width in images.image_grid_pinpoints)
    source.same("image_grid_pinpoints", canvases, tuple(map(tuple, source.config.image_grid_pinpoints)))
    if odd := [canvas for canvas in canvases if canvas[0] % view or canvas[1] % view]:
        raise source.error(f"image_grid_pinpoints {list(odd[0])} is not whole views of {view} pixels")
    thins = source.name.startswith("LlavaOnevision")
    return AnyResolution(
        view=view,
        tokens=vision.image_size // vision.patch_size,
        canvases=canvases,
        most=_most(source) if thins else None,
        square=thins,
        **source.levels(),
    )


def _most(source: Source) -> int:
    found = re.fullmatch(r"anyres_max_(\d+)", source.config.vision_aspect_ratio)
    if found is None:
        raise source.error(
            f"vision_aspect_ratio {source.config.vision_aspect_ratio!r} in config.json is not supported, "
            "only anyres_max_N"
        )
    return int(found[1])
