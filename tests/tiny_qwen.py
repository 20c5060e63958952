"""Tiny random Qwen2-VL and Qwen2.5-VL checkpoints, written as a user's would be.

`from tiny_qwen import tiny_qwen`. Weights as in `tiny_models`: a wrong computation shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB, WORDS, draw_weights
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")
FAMILIES = ("qwen2_vl", "qwen2_5_vl")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|> <|image_pad|> <|vision_end|> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endif %}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def tiny_qwen(
    path: Path | str,
    family: str = "qwen2_vl",
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 4,
    tie: bool = False,
    old_names: bool = True,
    shard: str = "1GB",
    min_pixels: int = 28 * 28,
    max_pixels: int = 64 * 28 * 28,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Writes a random model with tokenizer, image processor and chat template.

    Patches of 14 x 14 pixels, 2 x 2 of them make a visual token. Qwen2.5-VL: windows of 4 x 4 tokens, and
    every second layer without windows.

    Args:
        path: directory to write, made where missing.
        family: `qwen2_vl` or `qwen2_5_vl`.
        tie: the LM head shares the token embeddings.
        old_names: tensors named as Qwen publishes them (`visual.`, `model.layers.`), otherwise as
            transformers' modules are (`model.visual.`, `model.language_model.`).
        shard: largest size of a weight file.
        min_pixels, max_pixels: what an image is resized to lie between.
        dtype: torch dtype name that the weights are saved in.

    Returns:
        `path`.
    """
    path = Path(path)
    config, model_class = _configuration(
        family, layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, depth=vision_layers, tie=tie
    )
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    draw_weights(model, layers, generator)
    with torch.no_grad():
        for block in model.model.visual.blocks:  # attention far from uniform
            block.attn.qkv.weight[: 2 * block.attn.dim] *= 1.7
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 0, 2, 0
    model.to(getattr(torch, dtype)).save_pretrained(
        path, save_original_format=old_names, max_shard_size=shard
    )
    _tokenizer().save_pretrained(path)
    Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels).save_pretrained(path)
    return path


def _configuration(
    family: str, *, layers: int, hidden: int, heads: int, kv_heads: int, depth: int, tie: bool
) -> tuple[Any, Any]:
    """The configuration and the class of the model."""
    import transformers

    pairs = hidden // heads // 2  # rotary frequencies of a head
    text = dict(
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8],
        },
    )
    tokens = [*SPECIAL, *PADS]
    shared = dict(
        text_config=text,
        tie_word_embeddings=tie,
        image_token_id=tokens.index("<|image_pad|>"),
        video_token_id=tokens.index("<|video_pad|>"),
        vision_start_token_id=tokens.index("<|vision_start|>"),
        vision_end_token_id=tokens.index("<|vision_end|>"),
    )
    if family == "qwen2_vl":
        vision = dict(depth=depth, embed_dim=32, hidden_size=hidden, num_heads=2)
        return (
            transformers.Qwen2VLConfig(vision_config=vision, **shared),
            transformers.Qwen2VLForConditionalGeneration,
        )
    vision = dict(
        depth=depth,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=hidden,
        num_heads=2,
        window_size=112,
        fullatt_block_indexes=list(range(1, depth, 2)),
    )
    return (
        transformers.Qwen2_5_VLConfig(vision_config=vision, **shared),
        transformers.Qwen2_5_VLForConditionalGeneration,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *PADS, "<unk>", "system", "user", "assistant", *WORDS]
    words += [f"w{number}" for number in range(VOCAB - len(words))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in PADS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        chat_template=CHAT_TEMPLATE,
    )
