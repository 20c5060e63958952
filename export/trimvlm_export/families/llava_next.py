"""LLaVA-NeXT (LLaVA-1.6): tiles of any resolution, each seen by a CLIP tower; MLP projector.

A grid is what unpadding leaves of the tiles' tokens. Without one, an image is one view and one newline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trimvlm.encoder_rules import Tower, VisionTaps
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
        UserError: a grid that no image comes to.
    """
    return _tiled.layout(config, grid, most=None)


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
    """For each image its views, without those that fill the batch."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = model.config
    for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        count = image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)
        yield patch_views(model, pixels[:count])


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""
    return model.model.multi_modal_projector(rows)
