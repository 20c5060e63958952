"""How published checkpoints prepare images: frozen, and as transformers' own processors.

`from image_families import FAMILIES`: name to (frozen processing, function that makes the processor).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image
from transformers import (
    GotOcr2ImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

from trimvlm.image_processing import AnyResolution, ImageProcessing, Patches, SingleView, Tiles

SKIMAGE = Path(skimage.data.__file__).parent
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"

CLIP: Any = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF: Any = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET: Any = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
BICUBIC: Any = {"resample": 3, "rescale": 1 / 255}

NEXT_CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION_CANVASES = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))

MOBILEVLM = SingleView(square=True, resize=336, crop=(336, 336), **BICUBIC, **CLIP)
NEXT = AnyResolution(view=336, tokens=24, canvases=NEXT_CANVASES, most=None, square=False, **BICUBIC, **CLIP)
ONEVISION = AnyResolution(
    view=384, tokens=27, canvases=ONEVISION_CANVASES, most=9, square=True, **BICUBIC, **HALF
)
INTERNVL = Tiles(view=448, tokens=16, least=1, most=12, **BICUBIC, **IMAGENET)
QWEN = Patches(patch=14, merge=2, frames=2, least=56 * 56, most=28 * 28 * 1280, **BICUBIC, **CLIP)


def _mobilevlm() -> Any:
    return LlavaImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_pad=True
    )


def next_processor() -> Any:
    """llava-hf/llava-v1.6-vicuna-7b-hf."""
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=[list(canvas) for canvas in NEXT_CANVASES],
    )


def onevision_processor() -> Any:
    """llava-hf/llava-onevision-qwen2-0.5b-ov-hf."""
    return LlavaOnevisionImageProcessorPil(
        size={"height": 384, "width": 384},
        image_grid_pinpoints=[list(canvas) for canvas in ONEVISION_CANVASES],
        image_mean=HALF["mean"],
        image_std=HALF["std"],
    )


def internvl_processor() -> Any:
    """OpenGVLab/InternVL3-1B-hf."""
    return GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, image_mean=IMAGENET["mean"], image_std=IMAGENET["std"]
    )


FAMILIES: dict[str, tuple[ImageProcessing, Callable[[], Any]]] = {
    "mobilevlm": (MOBILEVLM, _mobilevlm),
    "llava_next": (NEXT, next_processor),
    "llava_onevision": (ONEVISION, onevision_processor),
    "internvl": (INTERNVL, internvl_processor),
    "qwen2_vl": (QWEN, Qwen2VLImageProcessorPil),
}


def their_pixels(family: str, image: Any) -> np.ndarray:
    """Pixels of one image (a Pillow image or a path) from transformers' processor, in our shape."""
    options = {"crop_to_patches": True} if family == "internvl" else {}  # as InternVLProcessor asks for
    pixels = np.asarray(FAMILIES[family][1]()(images=image, **options)["pixel_values"])
    return pixels[0] if family in ("llava_next", "llava_onevision") else pixels


def photo(width: int, height: int, name: str = "chelsea.png") -> Image.Image:
    """A photograph at any size."""
    return Image.open(SKIMAGE / name).resize((width, height))


def modes() -> dict[str, Image.Image]:
    """One picture in the modes that files come in."""
    picture = photo(150, 101)
    rgba = picture.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(picture.size))
    keyed = picture.convert("P")
    keyed.info["transparency"] = 7
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 251
    return {
        "L": picture.convert("L"),
        "1": picture.convert("1"),
        "P": picture.convert("P"),
        "P transparent": keyed,
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "CMYK": picture.convert("CMYK"),
        "YCbCr": picture.convert("YCbCr"),
        "I;16": Image.fromarray(deep),
        "F": picture.convert("F"),
    }
