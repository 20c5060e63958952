"""Vision tower and projector as ONNX: one graph, or two where an encoder stage works between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trimvlm.encoder_rules import EncoderStage, VisionTaps, taps
from trimvlm.profile import Grid
from trimvlm_export.passes.bfloat16 import widen
from trimvlm_export.passes.gelu import halve_inputs
from trimvlm_export.passes.primitive import OPSET
from trimvlm_export.source import Source
from trimvlm_export.trace import MADE_OF, attach_weights, made_of, save, trace

PROJECTOR = "projector.onnx"

EXAMPLE = 2  # of a dimension that varies, in the example that is traced


def export_vision(source: Source, stage: EncoderStage | None, grid: Grid | None) -> tuple[str, str | None]:
    """Writes what a profile needs before the decoder; profiles that need the same share the files.

    Returns:
        The vision graph's file name, and the projector's where there is an encoder stage.
    """
    if stage is None:
        return export_tower(source, grid, None), None
    return export_tower(source, grid, taps(stage.by)), export_projector(source, grid)


def export_tower(source: Source, grid: Grid | None, wanted: VisionTaps | None) -> str:
    """Writes the tower with its taps, or where none are wanted with the projector; returns the file name."""
    parts = [name.replace("_attention", "").replace(".", "") for name in wanted.names] if wanted else []
    file = "-".join(
        ["vision", *(["tower"] if wanted else []), *parts, *([f"{grid[0]}x{grid[1]}"] if grid else [])]
    )
    _write(
        source,
        f"{file}.onnx",
        lambda: source.family.Vision(source.config, grid, wanted),
        inputs={"pixel_values": source.family.pixel_values(source.config, grid)},
        outputs=["tower", *wanted.names] if wanted else ["visual"],
    )
    return f"{file}.onnx"


def export_projector(source: Source, grid: Grid | None) -> str:
    """Writes the projector alone; returns the file name."""
    width = source.family.tower(source.config, grid).width
    _write(
        source,
        PROJECTOR,
        lambda: source.family.Projector(source.config),
        inputs={"features": ["rows", width]},
        outputs=["visual"],
    )
    return PROJECTOR


def _write(
    source: Source,
    file: str,
    make: Callable[[], Any],
    *,
    inputs: dict[str, list[int | str]],
    outputs: list[str],
) -> None:
    """Consumes the weights of the module that `make` gives; writes its graph where it is not there yet."""
    if names := made_of(source.out / file):
        source.tensors.taken |= names
        return
    module = make()
    names = module.parameter_names()
    weights = source.load(module.requires_grad_(False), names)
    dtype = getattr(torch, source.dtype)
    sizes = {name: [EXAMPLE if isinstance(n, str) else n for n in dims] for name, dims in inputs.items()}
    example = {name: torch.zeros(dims, dtype=dtype) for name, dims in sizes.items()}
    model = trace(
        module,
        example,
        lambda name, dimension: isinstance(inputs[name][dimension], str),
        inputs=inputs,
        outputs=dict.fromkeys(outputs),
        opset=OPSET,  # one graph for every target
    )
    halve_inputs(model)
    attach_weights(model, weights, source.out)
    save(widen(model), source.out / file, properties={MADE_OF: "\n".join(sorted(names.values()))})
