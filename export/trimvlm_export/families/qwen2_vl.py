"""Qwen2-VL: vision transformer over all patches, merger of 2 x 2 patches, Qwen2 decoder with mRoPE.

A grid counts visual tokens: pixels / 28 each way.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.qwen_vision import TOWER, GridVision, TokenMerger
from trimvlm_export.reference_qwen import reference_project, reference_views

__all__ = [
    "DECODER_PREFIX",
    "LM_HEAD",
    "Projector",
    "Vision",
    "canonical",
    "checked",
    "make_tower",
    "model_spec",
    "pixel_values",
    "reference_project",
    "reference_views",
    "tower",
    "tower_of_width",
    "unused",
]

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

# Qwen's own names, and transformers' since its version 4.52.
_RENAMES = (
    (r"^visual\.", TOWER),
    (r"^model\.(?!language_model\.|visual\.)", DECODER_PREFIX),
)

LONGEST = 200  # sides of an image: the processor refuses more extreme ones


def canonical(name: str) -> str:
    """Parameter name in transformers 5 for a tensor name in a checkpoint."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: no grid, or one that no image makes.
    """
    text, (rows, columns) = config.text_config, checked(config, grid)
    return ModelSpec(
        family=config.model_type,
        fingerprint=fingerprint,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        ffn=text.intermediate_size,
        vocab=text.vocab_size,
        visual_tokens=rows * columns,
        grid=(rows, columns),
        mrope=True,
    )


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower; its "patches" are visual tokens.

    Raises:
        UserError: no grid, or one that no image makes.
    """
    return tower_of_width(config, grid, config.vision_config.embed_dim)


def tower_of_width(config: Any, grid: Grid | None, width: int) -> Tower:
    """As `tower`, for a vision transformer of this width."""
    vision, (rows, columns) = config.vision_config, checked(config, grid)
    return Tower(
        layers=vision.depth,
        patches=rows * columns,
        cls=False,
        features=(vision.depth,),
        width=width * vision.spatial_merge_size**2,
        columns=columns,
    )


def checked(config: Any, grid: Grid | None) -> Grid:
    """The grid.

    Raises:
        UserError: no grid, or one that no image makes.
    """
    pixels = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    if grid is None:
        raise UserError(
            f"grid: images of a {config.model_type} model have no fixed size; give an image size, or a grid: "
            f"rows and columns of visual tokens (pixels / {pixels})"
        )
    if min(grid) < 1 or max(grid) > LONGEST * min(grid):
        raise UserError(
            f"grid: {grid[0]} x {grid[1]} visual tokens cannot come from an image; give at least one row and "
            f"column ({pixels} pixels each), and no side more than {LONGEST} times as long as the other"
        )
    return grid


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input: the patches of one image, flattened."""
    vision, (rows, columns) = config.vision_config, checked(config, grid)
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return [rows * columns * vision.spatial_merge_size**2, patch]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "tied to the token embeddings"
    return "rotary frequencies follow from the configuration" if name.endswith(".inv_freq") else None


def make_tower(config: Any) -> nn.Module:
    """transformers' vision transformer, without weights."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    with torch.device("meta"):
        return Qwen2VisionTransformerPretrainedModel(config.vision_config)


class Vision(GridVision):
    """Vision tower and merger for one grid: see `qwen_vision.GridVision`."""

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        super().__init__(make_tower(config), config, checked(config, grid), taps)


class Projector(TokenMerger):
    """The merger: see `qwen_vision.TokenMerger`."""

    def __init__(self, config: Any) -> None:
        super().__init__(make_tower(config))
