"""Patches of an image of its own size: the processor of Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

from trimvlm.image_processing import Patches
from trimvlm_export.processing.source import Source

PROCESSORS = ("Qwen2VLImageProcessor",)
OPTIONS: dict[str, Any] = {}


def freeze(source: Source) -> Patches:
    """The options.

    Raises:
        UserError: patches that the tower does not take.
    """
    images, vision = source.images, source.vision
    source.same("patch_size", images.patch_size, vision.patch_size)
    source.same("merge_size", images.merge_size, vision.spatial_merge_size)
    source.same("temporal_patch_size", images.temporal_patch_size, vision.temporal_patch_size)
    return Patches(
        patch=images.patch_size,
        merge=images.merge_size,
        frames=images.temporal_patch_size,
        least=images.size["shortest_edge"],
        most=images.size["longest_edge"],
        **source.levels(),
    )
