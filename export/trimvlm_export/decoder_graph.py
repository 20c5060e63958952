"""The decoder as ONNX: module, weights in place, trace, file."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from trimvlm.bundle import Lowering
from trimvlm.schedule import Schedule
from trimvlm_export.decoder import Decoder
from trimvlm_export.graph_io import decoder_example, decoder_inputs, decoder_outputs, is_dynamic
from trimvlm_export.operators import OPSET
from trimvlm_export.passes.primitive import to_primitive
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save, trace


def export_decoder(source: Source, name: str, schedule: Schedule) -> dict[Lowering, str]:
    """Traces the decoder for the profile `name` once and writes it in both lowerings.

    Returns:
        Lowering to file name.
    """
    module = make_decoder(source.config, schedule)
    weights = source.load(module, decoder_names(source.family, source.config, module))
    model = trace(
        module,
        decoder_example(schedule, dtype=getattr(torch, source.dtype)),
        is_dynamic,
        inputs=decoder_inputs(schedule),
        outputs=decoder_outputs(schedule),
        opset=OPSET,
    )
    attach_weights(model, weights, source.out)
    files: dict[Lowering, str] = {
        "fused": f"{name}.decoder.fused.onnx",
        "primitive": f"{name}.decoder.primitive.onnx",
    }
    save(model, source.out / files["fused"])
    save(to_primitive(model), source.out / files["primitive"])
    return files


def make_decoder(config: Any, schedule: Schedule) -> Decoder:
    """The decoder without weights; rotary frequencies as transformers computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = config.text_config
    rotary = LlamaRotaryEmbedding(text)
    with torch.device("meta"):
        module = Decoder(text, schedule, torch.empty(0), float(rotary.attention_scaling))
    module.inv_freq = rotary.inv_freq.float()
    return module.requires_grad_(False).eval()


def decoder_names(family: ModuleType, config: Any, module: nn.Module) -> dict[str, str]:
    """From the decoder's parameter names to transformers' names in the whole model."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.text_config.tie_word_embeddings else {}
    names = {}
    for name, _ in module.named_parameters():
        source = tied.get(name, name)
        names[name] = source if source.startswith(family.LM_HEAD) else family.DECODER_PREFIX + source
    return names
