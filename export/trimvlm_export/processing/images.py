"""Freezes a checkpoint's image processor, by its class, and proves the result on examples.

One file per kind of processing gives:

    PROCESSORS                  names of transformers' classes, without `Pil` or `Fast`
    OPTIONS                     what the family's whole processor asks of the image processor at each call
    freeze(source)              the options, `Source` to a type of `trimvlm.image_processing`
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from trimvlm.image_processing import ImageProcessing
from trimvlm.images import fit, make_preprocessor, pixel_std, profile_grid
from trimvlm_export.processing import any_resolution, patches, single_view, tiles
from trimvlm_export.processing.load import load_config, load_processor
from trimvlm_export.processing.source import Source

KINDS = (single_view, any_resolution, tiles, patches)

# Sizes (width, height) that tell resize rules, crops, paddings and tiles apart.
SIZES = ((64, 64), (97, 53), (41, 160), (1, 7), (700, 351))


def image_processing(checkpoint: Path | str) -> ImageProcessing:
    """The checkpoint's image processing.

    Raises:
        UserError: no image processor in the checkpoint, one of an unknown class, a step that trimvlm does not
            know, or images that the model does not take.
    """
    processor = load_processor(checkpoint)
    source = Source(str(checkpoint), processor.image_processor, processor, load_config(checkpoint))
    kind = _kind(source)
    frozen = kind.freeze(source)
    _prove(source, kind.OPTIONS, frozen)
    return frozen


def _kind(source: Source) -> ModuleType:
    name = re.sub("(Pil|Fast)$", "", source.name)
    for kind in KINDS:
        if name in kind.PROCESSORS:
            return kind
    known = ", ".join(sorted(name for kind in KINDS for name in kind.PROCESSORS))
    raise source.error(f"is not supported; supported: {known}")


def _prove(source: Source, options: dict[str, Any], frozen: ImageProcessing) -> None:
    """Compares pixels with transformers: within one of 255 levels, for what rounding may do."""
    random = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        grid = profile_grid(frozen, width, height)
        ours = make_preprocessor(frozen, grid)(image)
        given = image if grid is None else fit(frozen, image, grid)
        theirs = np.asarray(source.images(images=given, **options)["pixel_values"])
        if theirs.size != ours.size or np.any(
            np.abs(ours - theirs.reshape(ours.shape)) * pixel_std(frozen) > 1.01 * frozen.rescale
        ):
            raise source.error(
                f"does more than its options say (see {width} x {height}); trimvlm cannot prepare its images"
            )
