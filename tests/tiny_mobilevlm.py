"""Tiny random MobileVLM-V2 checkpoints, written as the published ones are, but as safetensors."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import draw_weights
from transformers import LlamaTokenizer

from trimvlm_export.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration

# What the published config.json of the 1.7B model says, as its code writes it.
PUBLISHED = {
    "architectures": ["MobileLlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "mm_hidden_size": 1024,
    "mm_projector_type": "ldpnetv2",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "mobilevlm",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.33.1",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vision_tower_type": "clip",
    "vocab_size": 32000,
}

# Special tokens, then bytes, then characters: as in Llama's vocabulary, without its merged words.
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.printable[:94]]

TOWER = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 96,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "projection_dim": 32,
}

_TO_PUBLISHED = {
    "model.language_model.": "model.",
    "model.vision_tower.": "model.vision_tower.vision_tower.vision_model.",
    "model.multi_modal_projector.linear_1.": "model.mm_projector.mlp.mlp.0.",
    "model.multi_modal_projector.linear_2.": "model.mm_projector.mlp.mlp.2.",
    "model.multi_modal_projector.position.": "model.mm_projector.peg.peg.0.",
}


def tiny_config(layers: int = 2, kv_heads: int = 4) -> dict[str, Any]:
    """config.json of a tiny model: the published keys, and the tower's, whose geometry no name tells."""
    return PUBLISHED | {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "vocab_size": len(TOKENS),
        "max_position_embeddings": 512,
        "mm_hidden_size": TOWER["hidden_size"],
        "mm_vision_tower": "tiny",
        "torch_dtype": "float32",
        "vision_config": TOWER,
    }


def tiny_mobilevlm(
    path: Path | str, *, layers: int = 2, kv_heads: int = 4, shards: int = 1, seed: int = 0
) -> Path:
    """Writes a random MobileVLM-V2 with 24 x 24 patches and 144 visual tokens, and a tokenizer without
    `<image>`; as published, there is no processor and no chat template.

    Args:
        path: directory to write, made where missing.
        shards: safetensors files, with an index where there are several.

    Returns:
        `path`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(layers, kv_heads)
    model = MobileVLMForConditionalGeneration(MobileVLMConfig(**config)).eval()
    draw_weights(model, layers, torch.Generator().manual_seed(seed))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (path / "generation_config.json").write_text(json.dumps(ends))
    save_published({name: p.detach() for name, p in model.named_parameters()}, path, shards)
    _tokenizer(path)
    return path


def save_published(weights: dict[str, torch.Tensor], path: Path, shards: int = 1) -> None:
    """Writes parameters of the reference model under the published names."""
    published = {_published(name): weight.contiguous() for name, weight in weights.items()}
    names = list(published)
    files = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: published[name] for name in names[number::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    if shards > 1:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def _published(name: str) -> str:
    for own, published in _TO_PUBLISHED.items():
        if name.startswith(own):
            return published + name.removeprefix(own)
    return name


def _tokenizer(path: Path) -> None:
    """A Llama tokenizer of single characters and bytes, in the form that the published ones had."""
    LlamaTokenizer(vocab={token: n for n, token in enumerate(TOKENS)}).save_pretrained(path)
