"""What is said of text models here against transformers' own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from trimvlm.errors import UserError
from trimvlm_export.text_model import TEXT_MODELS, biases, check_text_model, rotary

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 5e5},
    "linear": {"rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
PLAIN = {"input_layernorm.weight", "post_attention_layernorm.weight"}


def configured(kind: str, **fields: Any) -> Any:
    if kind.endswith("_text"):
        config = AutoConfig.for_model(kind.removesuffix("_text"), text_config={**SIZES, **fields})
        return config.get_text_config()
    return AutoConfig.for_model(kind, **SIZES, **fields)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True}, {"mlp_bias": True}], ids=str)
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_biases_are_those_of_transformers_layers(kind: str, fields: dict[str, Any]) -> None:
    text = configured(kind, **fields)
    check_text_model(text)
    with torch.device("meta"):
        layer = AutoModel.from_config(text).layers[0]
    names = [name for name, _ in layer.named_parameters()]
    assert {name.split(".")[-2] for name in names if name.endswith(".bias")} == biases(text)
    projections = {name.split(".")[-2] for name in names if name not in PLAIN}
    assert projections == {*(f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down"))}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_rotary_frequencies_are_those_of_transformers_models(kind: str, rope: str) -> None:
    mrope = {"mrope_section": [1, 1, 2]} if kind.endswith("_text") else {}
    text = configured(kind, rope_parameters={"rope_type": rope, **ROPES[rope], **mrope})
    embedding = AutoModel.from_config(text).rotary_emb
    inv_freq, scale = rotary(text)
    assert torch.equal(inv_freq, embedding.inv_freq)
    assert scale == embedding.attention_scaling


def test_other_arithmetic_is_refused() -> None:
    gemma = AutoConfig.for_model("gemma2")
    with pytest.raises(UserError, match=r"model_type: 'gemma2' is not supported, only llama"):
        check_text_model(gemma)
    sliding = configured("qwen2", layer_types=["sliding_attention"])
    with pytest.raises(UserError, match="use_sliding_window"):
        check_text_model(sliding)
