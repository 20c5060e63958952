"""What kinds of text model there are that compute what a Llama does, and what their configuration says.

transformers keeps this in its modelling code, whose import alone takes half a second; here it is said again,
and tests hold it against transformers' own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimvlm.errors import UserError

# RMS norms, gated SiLU, rotary attention. Whether queries, keys and values always have a bias; None: by the
# configuration, as the output projection and the feed-forward network.
TEXT_MODELS = {
    "llama": None,
    "mistral": False,
    "qwen2": True,
    "qwen2_vl_text": True,
    "qwen2_5_vl_text": True,
}


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


def biases(text: Any) -> set[str]:
    """Projections of a decoder layer that have a bias, e.g. `q_proj`."""
    queries = TEXT_MODELS[text.model_type]
    if queries is not None:
        return {"q_proj", "k_proj", "v_proj"} if queries else set()
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} if text.attention_bias else set()
    return attention | ({"gate_proj", "up_proj", "down_proj"} if text.mlp_bias else set())


def rotary(text: Any) -> tuple[Tensor, float]:
    """Rotary frequencies float32 [C/2] and the factor on cosines and sines.

    The default is that of RoFormer (section 3.2.2); the others are transformers' own functions.
    """
    kind = text.rope_parameters.get("rope_type", "default")
    if kind != "default":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](text)
        return inv_freq.float(), float(scale)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 1 / text.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0


def axes(sections: Sequence[int]) -> Tensor:
    """The coordinate (0 time, 1 row, 2 column) that each rotary frequency turns with, int64 [C/2]: the first
    `sections[0]` frequencies with the first, and so on (Qwen2-VL, section 2.1)."""
    return torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])
