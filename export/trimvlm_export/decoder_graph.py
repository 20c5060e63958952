"""The decoder as ONNX: module, weights in place, trace, file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from trimvlm.bundle import DecoderGraph
from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm_export.decoder import Decoder
from trimvlm_export.passes.primitive import to_primitive
from trimvlm_export.repeated_layers import trace_decoder
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save

# Kinds of text model that compute what a Llama does: RMS norms, gated SiLU, rotary attention, biases or not.
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text")
PARAMETERS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
}


def export_decoder(
    source: Source, name: str, schedule: Schedule, *, filled: bool = False
) -> dict[DecoderGraph, str]:
    """Traces the decoder for the profile `name` once and writes it in both lowerings.

    Args:
        filled: the graph without empty tensors (`trimvlm.filling`).

    Returns:
        Lowering to file name.
    """
    fused: DecoderGraph = "fused.filled" if filled else "fused"
    primitive: DecoderGraph = "primitive.filled" if filled else "primitive"
    files: dict[DecoderGraph, str] = {kind: f"{name}.decoder.{kind}.onnx" for kind in (fused, primitive)}
    module = make_decoder(source.config, schedule, filled=filled)
    weights = source.load(module, decoder_names(source.family, source.config, module))
    model = trace_decoder(module, dtype=getattr(torch, source.dtype))
    attach_weights(model, weights, source.out)
    save(model, source.out / files[fused])
    save(to_primitive(model), source.out / files[primitive])
    return files


def make_decoder(config: Any, schedule: Schedule, *, filled: bool = False) -> Decoder:
    """The decoder without weights; rotary frequencies and biases as transformers has them.

    Args:
        filled: the one without empty tensors.

    Raises:
        UserError: a text model that this decoder does not compute.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = config.text_config
    check_text_model(text)
    rotary = LlamaRotaryEmbedding(text)
    with torch.device("meta"):
        module = Decoder(
            text,
            schedule,
            torch.empty(0),
            float(rotary.attention_scaling),
            biases=_biases(text),
            filled=filled,
        )
    module.inv_freq = rotary.inv_freq.float()
    if schedule.model.mrope:
        module.axes = axes(text.rope_parameters["mrope_section"])
    return module.requires_grad_(False).eval()


def axes(sections: Sequence[int]) -> torch.Tensor:
    """The coordinate (0 time, 1 row, 2 column) that each rotary frequency turns with, int64 [C/2]: the first
    `sections[0]` frequencies with the first, and so on (Qwen2-VL, section 2.1)."""
    return torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])


def check_text_model(text: Any) -> None:
    """Refuses text models with other arithmetic than a Llama's.

    Raises:
        UserError: naming the kind or the setting.
    """
    if text.model_type not in TEXT_MODELS:
        raise UserError(
            f"text_config.model_type: {text.model_type!r} is not supported, only {', '.join(TEXT_MODELS)}"
        )
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise UserError(
            "text_config.layer_types: sliding_attention is not supported, only full_attention; set "
            "use_sliding_window to false if the prompts are shorter than the window"
        )
    kind = text.rope_parameters.get("rope_type", "default")
    # `dynamic` changes nothing up to `max_position_embeddings`, and no prompt of a graph is longer.
    if kind == "longrope":
        raise UserError(
            f"text_config.rope_parameters.rope_type: {kind!r} depends on the length of the prompt, which a "
            "static graph cannot; only default, linear, dynamic, yarn and llama3 are supported"
        )


def _biases(text: Any) -> set[str]:
    """Projections of a decoder layer that have a bias, as transformers' own model has them.

    Raises:
        UserError: a layer has parameters that this decoder has no use for.
    """
    from transformers import AutoModel

    shallow = copy.deepcopy(text)
    shallow.num_hidden_layers = 1
    if getattr(shallow, "layer_types", None):
        shallow.layer_types = shallow.layer_types[:1]
    with torch.device("meta"):
        layer = AutoModel.from_config(shallow).layers[0]
    names = {name.rsplit(".", 1)[0].rsplit(".", 1)[-1]: name for name, _ in layer.named_parameters()}
    if unknown := sorted(set(names) - PARAMETERS):
        raise UserError(f"text_config: layers of this model have {unknown[0]}, which is not supported")
    return {name.split(".")[-2] for name, _ in layer.named_parameters() if name.endswith(".bias")}


def decoder_names(family: ModuleType, config: Any, module: nn.Module) -> dict[str, str]:
    """From the decoder's parameter names to transformers' names in the whole model."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {}
    names = {}
    for name, _ in module.named_parameters():
        source = tied.get(name, name)
        names[name] = source if source.startswith(family.LM_HEAD) else family.DECODER_PREFIX + source
    return names
