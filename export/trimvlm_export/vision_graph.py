"""Vision tower and projector as ONNX."""

from __future__ import annotations

import torch

from trimvlm.encoder_rules import VisionTaps
from trimvlm_export.passes.primitive import OPSET
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save, trace


def export_vision(source: Source, taps: VisionTaps) -> str:
    """Writes the vision graph with the taps that a profile asks for; profiles with the same taps share it.

    Returns:
        The file name.
    """
    names = [*(f"cls{n}" for n in taps.cls_attention), *(f"hidden{n}" for n in taps.features)]
    file = "-".join(["vision", *names]) + ".onnx"
    module = source.family.Vision(source.config, taps).requires_grad_(False)
    weights = source.load(module, module.parameter_names())
    if (source.out / file).exists():
        return file
    vision = source.config.vision_config
    size, rows = vision.image_size, (vision.image_size // vision.patch_size) ** 2
    outputs: dict[str, list[str | int]] = {"visual": ["visual", source.config.text_config.hidden_size]}
    outputs |= {f"cls_attention.{n}": ["images", rows] for n in taps.cls_attention}
    outputs |= {f"features.{n}": ["images", rows + 1, vision.hidden_size] for n in taps.features}
    model = trace(
        module,
        {"pixel_values": torch.zeros(2, 3, size, size, dtype=getattr(torch, source.dtype))},
        lambda _, dimension: dimension == 0,
        inputs={"pixel_values": ["images", 3, size, size]},
        outputs=outputs,
        opset=OPSET,  # one graph for every target,
    )
    attach_weights(model, weights, source.out)
    save(model, source.out / file)
    return file
