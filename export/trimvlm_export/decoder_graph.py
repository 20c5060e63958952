"""The decoder as ONNX: module, weights in place, trace, file."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trimvlm.backends.caches import LAYERS
from trimvlm.bundle import DecoderGraph
from trimvlm.schedule import Schedule
from trimvlm_export.decoder import Decoder
from trimvlm_export.passes.causal import attend_in_pieces
from trimvlm_export.passes.in_place import to_in_place
from trimvlm_export.passes.lost_weights import read_caches_for_one_row
from trimvlm_export.passes.one_row import attend_to_one_row
from trimvlm_export.passes.primitive import to_primitive
from trimvlm_export.passes.residual import add_in_products
from trimvlm_export.passes.scaled import scale_queries
from trimvlm_export.passes.selections import rank_only_visual_rows
from trimvlm_export.repeated_layers import trace_decoder
from trimvlm_export.source import Source
from trimvlm_export.text_model import axes, biases, check_text_model, rotary
from trimvlm_export.trace import attach_weights, save


def export_decoder(
    source: Source, name: str, schedule: Schedule, *, filled: bool = False
) -> dict[DecoderGraph, str]:
    """Traces the decoder for the profile `name` once and writes it in both lowerings.

    Args:
        filled: the graph without empty tensors (`trimvlm.filling`).

    Returns:
        Lowering to file name; `in_place` where some caches can grow so.
    """
    fused: DecoderGraph = "fused.filled" if filled else "fused"
    primitive: DecoderGraph = "primitive.filled" if filled else "primitive"
    files: dict[DecoderGraph, str] = {kind: f"{name}.decoder.{kind}.onnx" for kind in (fused, primitive)}
    module = make_decoder(source.config, schedule, filled=filled)
    weights = source.load(module, decoder_names(source.family, source.config, module))
    model = trace_decoder(module, dtype=getattr(torch, source.dtype))
    attach_weights(model, weights, source.out)
    save(model, source.out / files[fused])
    if not filled:
        changed = model.clone()
        rank_only_visual_rows(changed)
        read_caches_for_one_row(changed, schedule)
        if layers := to_in_place(changed):
            attend_in_pieces(changed, schedule, layers)
            attend_to_one_row(changed, schedule, layers)
            scale_queries(changed)
            add_in_products(changed)
            files["in_place"] = f"{name}.decoder.in_place.onnx"
            rows = {layer: schedule.rows[layer].cached for layer in layers}
            told = json.dumps({"image": schedule.visual_tokens, "layers": rows})
            save(changed, source.out / files["in_place"], properties={LAYERS: told})
    save(to_primitive(model), source.out / files[primitive])
    return files


def make_decoder(config: Any, schedule: Schedule, *, filled: bool = False) -> Decoder:
    """The decoder without weights; rotary frequencies and biases as transformers has them.

    Args:
        filled: the one without empty tensors.

    Raises:
        UserError: a text model that this decoder does not compute.
    """
    text = config.text_config
    check_text_model(text)
    inv_freq, rope_scale = rotary(text)
    with torch.device("meta"):
        module = Decoder(
            text,
            schedule,
            torch.empty(0),
            rope_scale,
            biases=biases(text),
            filled=filled,
        )
    module.inv_freq = inv_freq
    if schedule.model.mrope:
        module.axes = axes(text.rope_parameters["mrope_section"])
    return module.requires_grad_(False).eval()


def decoder_names(family: ModuleType, config: Any, module: nn.Module) -> dict[str, str]:
    """From the decoder's parameter names to transformers' names in the whole model."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}
    names = {}
    for name, _ in module.named_parameters():
        source = tied.get(name, name)
        names[name] = source if source.startswith(family.LM_HEAD) else family.DECODER_PREFIX + source
    return names
