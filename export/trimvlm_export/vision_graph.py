"""Vision tower and projector as ONNX: one graph, or two where an encoder stage works between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from trimvlm.encoder_rules import EncoderStage, VisionTaps, taps
from trimvlm_export.passes.primitive import OPSET
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save, trace

PROJECTOR = "projector.onnx"

Shapes: TypeAlias = Mapping[str, Sequence[Any]]


def export_vision(source: Source, stage: EncoderStage | None) -> tuple[str, str | None]:
    """Writes what a profile needs before the decoder; profiles that need the same share the files.

    Returns:
        The vision graph's file name, and the projector's where there is an encoder stage.
    """
    if stage is None:
        return export_tower(source, None), None
    return export_tower(source, taps(stage.by)), export_projector(source)


def export_tower(source: Source, wanted: VisionTaps | None) -> str:
    """Writes the tower with its taps, or where none are wanted with the projector; returns the file name."""
    vision, geometry = source.config.vision_config, source.family.tower(source.config)
    size, rows = vision.image_size, geometry.patches + geometry.cls
    if wanted is None:
        file, outputs = "vision.onnx", {"visual": ["visual", source.config.text_config.hidden_size]}
    else:
        parts = [name.replace("_attention", "").replace(".", "") for name in wanted.names]
        file = "-".join(["vision-tower", *parts]) + ".onnx"
        heads = [vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads]
        shapes = {"keys": [rows, *heads], "features": [rows, vision.hidden_size]}
        outputs = {"tower": ["images", rows, geometry.width]}
        outputs |= {n: ["images", *shapes.get(n.split(".")[0], [geometry.patches])] for n in wanted.names}
    _write(
        source,
        file,
        source.family.Vision(source.config, wanted),
        inputs={"pixel_values": ["images", 3, size, size]},
        outputs=outputs,
    )
    return file


def export_projector(source: Source) -> str:
    """Writes the projector alone; returns the file name."""
    width = source.family.tower(source.config).width
    _write(
        source,
        PROJECTOR,
        source.family.Projector(source.config),
        inputs={"features": ["rows", width]},
        outputs={"visual": ["rows", source.config.text_config.hidden_size]},
    )
    return PROJECTOR


def _write(source: Source, file: str, module: Any, *, inputs: Shapes, outputs: Shapes) -> None:
    """Consumes the module's weights, and writes the graph where it is not there yet."""
    weights = source.load(module.requires_grad_(False), module.parameter_names())
    if (source.out / file).exists():
        return
    dtype = getattr(torch, source.dtype)
    model = trace(
        module,
        {name: torch.zeros(2, *sizes[1:], dtype=dtype) for name, sizes in inputs.items()},
        lambda _, dimension: dimension == 0,
        inputs=inputs,
        outputs=outputs,
        opset=OPSET,  # one graph for every target
    )
    attach_weights(model, weights, source.out)
    save(model, source.out / file)
