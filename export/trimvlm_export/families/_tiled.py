"""LLaVA-NeXT and LLaVA-OneVision: a CLIP or SigLIP tower sees the image and its tiles; the decoder reads them
in the order of the image, each row ended by a newline.

Shapes: I views, n x n patches of a view, E' width that the projector reads, D model width, N visual rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.families import _anyres, _towers
from trimvlm_export.families._anyres import Layout

NEWLINE = "model.image_newline"

# A [CLS] row has no place on the grid; where there is none, no row may be dropped.
STRATEGIES = {"clip_vision_model": "default", "siglip_vision_model": "full"}


def layout(config: Any, grid: Grid | None, most: int | None) -> Layout:
    """How the tokens of an image lie.

    Args:
        grid: None: the view of the whole image alone.
        most: how many views' worth of tokens the grid may have before it is thinned out, or None.

    Raises:
        UserError: a grid that no image comes to.
    """
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    if grid is None:
        return Layout(side=side)
    return _anyres.layout(
        grid, canvases=config.image_grid_pinpoints, view=vision.image_size, side=side, most=most
    )


def tower(config: Any, views: Layout) -> Tower:
    """The tower of one view.

    Raises:
        UserError: a tower of another kind, or features with or without [CLS] where it must be otherwise.
    """
    found = _towers.geometry(config, tuple(STRATEGIES), views=views.views)
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if strategy != STRATEGIES[kind]:
        raise UserError(
            f"vision_feature_select_strategy: {strategy!r} gives no square of patches with a {kind}, only "
            f"{STRATEGIES[kind]!r} does"
        )
    return found


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None, views: Layout) -> ModelSpec:
    """Geometry of the whole model.

    Raises:
        UserError: as `tower`.
    """
    tower(config, views)
    return ModelSpec(
        family=config.model_type,
        fingerprint=fingerprint,
        visual_tokens=views.visual_tokens,
        grid=grid,
        **_towers.decoder_geometry(config.text_config),
    )


def pixel_values(config: Any, views: Layout) -> list[int | str]:
    """Dimensions of the vision graph's input."""
    return [views.views, 3, config.vision_config.image_size, config.vision_config.image_size]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    if name == NEWLINE:
        return "an encoder stage leaves no rows of an image that a newline could end"
    return _towers.unused(config, name, _towers.geometry(config, tuple(STRATEGIES)))


class Vision(_towers.Views):
    """The tower, and without taps the projector and the decoder's order.

    Args:
        config: transformers' configuration of the whole model.
        views: how the tokens of the image lie.
        taps: None: what the decoder reads. Otherwise the tower's rows, view by view, and what the taps ask
            for.
    """

    def __init__(self, config: Any, views: Layout, taps: VisionTaps | None) -> None:
        super().__init__(config, tower(config, views), taps)
        self.views = views
        self.order: Tensor
        self.covered: Tensor
        if taps is None:
            self.projector = _towers.Projector(config)
            self.newline = nn.Parameter(torch.empty(config.text_config.hidden_size, device="meta"))
            self.register_buffer("order", torch.from_numpy(views.order()), persistent=False)
            if views.thinned:
                self.register_buffer("covered", torch.from_numpy(views.covered_rows()), persistent=False)

    def parameter_names(self) -> dict[str, str]:
        """As `Views.parameter_names`."""
        return super().parameter_names() | ({"newline": NEWLINE} if self.projector else {})

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [N, D]; or tower [I, S, E'], then the taps in order."""
        rows, found = self.see(pixel_values)
        if self.projector is None:
            return (rows, *(found[name] for name in self.taps.names))
        visual_ND = self.projector(rows[:, self.cls :]).flatten(0, 1)
        if self.views.thinned:
            covered_D1HW = visual_ND.index_select(0, self.covered).T.unflatten(1, self.views.covered)
            grid_1DHW = nn.functional.interpolate(covered_D1HW[None], self.views.grid, mode="bilinear")
            visual_ND = torch.cat((visual_ND[: self.views.side**2], grid_1DHW[0].flatten(1).T))
        # In one dimension: a newline of two would be a second copy in the graph.
        rows = torch.cat((visual_ND.flatten(), self.newline)).unflatten(0, (-1, len(self.newline)))
        return (rows.index_select(0, self.order),)
