"""LLaVA-1.5: CLIP tower with [CLS], MLP projector, Llama-style decoder.

Shapes: I images, S tower rows ([CLS] and N patches), N visual rows of one image, E' width that the projector
reads, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.families import _towers
from trimvlm_export.reference_views import ImageViews, patch_views

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

canonical = _towers.canonical
Projector = _towers.Projector


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: a grid, which this family does not have.
    """
    return ModelSpec(
        family="llava",
        fingerprint=fingerprint,
        visual_tokens=tower(config, grid).patches + (config.vision_feature_select_strategy == "full"),
        **_towers.decoder_geometry(config.text_config),
    )


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower.

    Raises:
        UserError: a tower of another kind, or a grid, which this family does not have.
    """
    if grid is not None:
        raise UserError("grid: every image is one view of a fixed size in a llava model; leave the grid out")
    return _towers.geometry(config, ("clip_vision_model",))


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input."""
    return ["images", 3, config.vision_config.image_size, config.vision_config.image_size]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    return _towers.unused(config, name, tower(config, None))


class Vision(_towers.Views):
    """Vision tower up to the last layer that anything needs: transformers' own modules.

    Args:
        config: transformers' LlavaConfig.
        grid: None.
        taps: None: with the projector, what the decoder reads. Otherwise without it: the tower's rows and
            what the taps ask for, which may be layers after the feature layer.
    """

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        super().__init__(config, tower(config, grid), taps)
        self.drop_cls = config.vision_feature_select_strategy == "default"
        self.projector = Projector(config) if taps is None else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [I * N, D]; or tower [I, S, E'], then the taps in order."""
        rows, found = self.see(pixel_values)
        if self.projector is None:
            return (rows, *(found[name] for name in self.taps.names))
        return (self.projector(rows[:, 1:] if self.drop_cls else rows).flatten(0, 1),)


def reference_views(model: Any, inputs: Mapping[str, Any]) -> Iterator[ImageViews]:
    """For each image its one view."""
    for pixels in inputs["pixel_values"]:
        yield patch_views(model, pixels[None])


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""
    return model.model.multi_modal_projector(rows)
