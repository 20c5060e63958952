"""LLaVA-OneVision: tiles of any resolution, each seen by a SigLIP tower without [CLS]; MLP projector, Qwen2.

A grid is what unpadding leaves of the tiles' tokens, and where that is more than `anyres_max_9` allows, what
interpolation makes of it. Without a grid an image is one view and one newline, as each of several images in
one prompt is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.families import _tiled, _towers
from trimvlm_export.families._anyres import Layout
from trimvlm_export.reference_views import ImageViews, patch_views

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

canonical = _towers.canonical
Projector = _towers.Projector
unused = _tiled.unused


def layout(config: Any, grid: Grid | None) -> Layout:
    """How the tokens of an image lie.

    Raises:
        UserError: a grid that no image comes to, or an unknown rule for many tokens.
    """
    most = re.fullmatch(r"anyres_max_([1-9]\d*)", config.vision_aspect_ratio)
    if most is None:
        raise UserError(
            f"vision_aspect_ratio: {config.vision_aspect_ratio!r} is not supported, only 'anyres_max_N'"
        )
    return _tiled.layout(config, grid, most=int(most[1]))


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: a grid that no image comes to, or a tower that this family cannot have.
    """
    return _tiled.model_spec(config, fingerprint, grid, layout(config, grid))


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower. Errors as `model_spec`."""
    return _tiled.tower(config, layout(config, grid))


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input: the whole image, then its tiles row by row."""
    return _tiled.pixel_values(config, layout(config, grid))


class Vision(_tiled.Vision):
    """See `_tiled.Vision`."""

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        super().__init__(config, layout(config, grid), taps)


def reference_views(model: Any, inputs: Mapping[str, Any]) -> Iterator[ImageViews]:
    """For each image its views, none that only fill the batch; of several in one prompt, one view each."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    config, sizes = model.config, inputs["image_sizes"]
    in_prompt = inputs.get("batch_num_images", [1] * len(sizes))
    alone = [number == 1 for number in in_prompt for _ in range(number)]
    for pixels, size, tiled in zip(inputs["pixel_values"], sizes, alone, strict=True):
        pinpoints, view = config.image_grid_pinpoints, config.vision_config.image_size
        yield patch_views(model, pixels[: image_size_to_num_patches(size, pinpoints, view) if tiled else 1])


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""
    return model.model.multi_modal_projector(rows)
