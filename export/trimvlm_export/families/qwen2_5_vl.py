"""Qwen2.5-VL: as Qwen2-VL, with a vision transformer that attends within windows in most of its layers.

Shapes: as in `qwen2_vl`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.profile import Grid
from trimvlm_export.families import qwen2_vl
from trimvlm_export.families.qwen2_vl import (
    DECODER_PREFIX,
    LM_HEAD,
    canonical,
    model_spec,
    pixel_values,
    reference_project,
    reference_views,
    unused,
)
from trimvlm_export.qwen_vision import GridVision, TokenMerger

__all__ = [
    "DECODER_PREFIX",
    "LM_HEAD",
    "Projector",
    "Vision",
    "canonical",
    "model_spec",
    "pixel_values",
    "reference_project",
    "reference_views",
    "tower",
    "unused",
]


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower; its "patches" are visual tokens.

    Raises:
        UserError: no grid, or one that no image makes.
    """
    return qwen2_vl.tower_of_width(config, grid, config.vision_config.hidden_size)


class Vision(GridVision):
    """Vision tower and merger for one grid: see `qwen_vision.GridVision`.

    In layers with windows a patch receives attention from its own window alone: taps of them rank a token
    among its neighbours.
    """

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        grid = qwen2_vl.checked(config, grid)
        order, windows = _windows(config.vision_config, grid)
        super().__init__(
            _make_tower(config),
            config,
            grid,
            taps,
            order=order,
            windows=windows,
            full=tuple(config.vision_config.fullatt_block_indexes),
        )


class Projector(TokenMerger):
    """The merger: see `qwen_vision.TokenMerger`."""

    def __init__(self, config: Any) -> None:
        super().__init__(_make_tower(config))


def _make_tower(config: Any) -> nn.Module:
    """transformers' vision transformer, without weights."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    with torch.device("meta"):
        return Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)


def _windows(vision: Any, grid: Grid) -> tuple[Tensor, list[tuple[int, int]]]:
    """Visual tokens in the order of their windows, int64 [N], and (number, patches) of equal windows.

    transformers goes through the windows row by row; here larger ones come first, so that windows of one
    size lie together.
    """
    from transformers.vision_utils import get_vision_window_index

    side = vision.spatial_merge_size
    index_N, bounds = get_vision_window_index(
        torch.tensor([[1, grid[0] * side, grid[1] * side]]), side, vision.window_size, vision.patch_size
    )
    windows = index_N.split((bounds.diff() // side**2).tolist())
    ordered = sorted(windows, key=len, reverse=True)
    counts = Counter(len(window) for window in ordered)
    return torch.cat(ordered), [(number, size * side**2) for size, number in counts.items()]
