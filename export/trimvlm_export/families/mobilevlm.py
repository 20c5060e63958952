"""MobileVLM-V2: CLIP tower, LDPv2 projector (144 visual tokens), Llama decoder.

LDPv2 looks at neighbourhoods, so an encoder stage can only choose after it: with taps the `tower` output is
what the projector gives, [I, 144, D] without a [CLS] row, and the projector graph is the identity. Scores and
features are the mean over the 2 x 2 patches that a token covers.

Shapes: I images, P patches of one image, N visual rows of one image, D model width, E tower width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.families import _towers
from trimvlm_export.mobilevlm import weights  # this also tells transformers what a mobilevlm is
from trimvlm_export.mobilevlm.config import SIDE, window
from trimvlm_export.mobilevlm.projector import LDPv2, pooled
from trimvlm_export.reference_views import ImageViews, patch_views

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

canonical = weights.canonical


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: a grid, which this family does not have, or patches that LDPv2 cannot pool.
    """
    return ModelSpec(
        family="mobilevlm",
        fingerprint=fingerprint,
        visual_tokens=tower(config, grid).patches,
        **_towers.decoder_geometry(config.text_config),
    )


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower with the projector behind it: its "patches" are visual tokens.

    Raises:
        UserError: a grid, which this family does not have, or patches that LDPv2 cannot pool.
    """
    if grid is not None:
        raise UserError("grid: every image is one view of a fixed size in MobileVLM; leave the grid out")
    clip = _towers.geometry(config, ("clip_vision_model",))
    window(config)
    return Tower(
        layers=clip.layers,
        patches=SIDE**2,
        cls=False,
        hidden_cls=True,
        features=clip.features,
        width=config.text_config.hidden_size,
    )


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input."""
    return ["images", 3, config.vision_config.image_size, config.vision_config.image_size]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    return _towers.unused(config, name, tower(config, None)) or weights.buffer(name)


class Vision(_towers.Views):
    """CLIP up to the last layer that anything needs, then LDPv2.

    Args:
        config: of the whole model.
        grid: None.
        taps: what an encoder stage reads; None: nothing but the visual rows.
    """

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        super().__init__(config, tower(config, grid), taps)
        self.rows_alone, self.window = taps is None, window(config)
        with torch.device("meta"):
            self.projector = LDPv2(config)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [I * N, D]; or tower [I, N, D], then the taps in order:
        attention [I, N], features [I, N, E]."""
        rows, found = self.see(pixel_values)
        visual = self.projector(rows[:, self.cls :])
        if self.rows_alone:
            return (visual.flatten(0, 1),)
        patches = (SIDE * self.window) ** 2  # without the row of [CLS], where there is one
        return (visual, *(pooled(found[name][:, -patches:], self.window) for name in self.taps.names))


class Projector(nn.Module):
    """The identity: the rows that an encoder stage chooses among have been projected."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def parameter_names(self) -> dict[str, str]:
        """None."""
        return {}

    def forward(self, features: Tensor) -> Tensor:
        """[rows, D] -> [rows, D]."""
        return features.clone()  # a graph's output cannot be its input


def reference_views(model: Any, inputs: Mapping[str, Any]) -> Iterator[ImageViews]:
    """For each image its one view."""
    side = SIDE * window(model.config)
    rows = 1 + np.arange(side**2).reshape(SIDE, side // SIDE, SIDE, side // SIDE)  # [CLS] is row 0
    tokens = rows.swapaxes(1, 2).reshape(SIDE**2, -1)
    for pixels in inputs["pixel_values"]:
        patches = patch_views(model, pixels[None])
        (projected,) = model.get_image_features(pixel_values=pixels[None], return_dict=True).pooler_output
        features = projected.float().cpu().numpy()
        yield ImageViews(
            1, lambda n, of=patches, rows=features: replace(of.see(n), features=rows, tokens=tokens)
        )


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """The rows, which have been projected."""
    return rows
