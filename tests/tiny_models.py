"""Tiny random LLaVA checkpoints, written as a user's would be: `from tiny_models import tiny_llava`.

The weights are drawn so that a wrong computation shows: attention is far from uniform, logits differ clearly
between tokens, norms are not all ones and biases are not all zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trimvlm.profile import Decisions, Method, Profile

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = (
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "the",
    "color",
    "of",
    "where",
    "how",
    "many",
    "are",
    "there",
    "?",
)
VOCAB = 64  # filled up with w0, w1, ...

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='user' %}USER: {% for c in m['content'] %}"
    "{% if c['type']=='image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_llava(
    path: Path | str,
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    vision_layers: int = 3,
    image_size: int = 32,
    patch_size: int = 8,
    attention_bias: bool = False,
    qwen2: bool = False,
    tie: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Writes a random LlavaForConditionalGeneration with tokenizer, processor and chat template.

    One image gives (image_size / patch_size)^2 visual tokens; the tower has a [CLS] token and features come
    from `vision_feature_layer` -2, as in LLaVA-1.5.

    Args:
        path: directory to write, made where missing.
        kv_heads: fewer than `heads` gives grouped-query attention.
        attention_bias: biases on Wq, Wk, Wv, Wo.
        qwen2: the text model is a Qwen2, with biases on Wq, Wk, Wv.
        tie: the LM head shares the token embeddings.
        dtype: torch dtype name that the weights are saved in.

    Returns:
        `path`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=vision_layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
        projection_dim=32,
    )
    text = (Qwen2Config if qwen2 else LlamaConfig)(
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        **({} if qwen2 else {"head_dim": hidden // heads, "attention_bias": attention_bias}),
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=tie,
    )
    model = LlavaForConditionalGeneration(config).eval()
    draw_weights(model, layers, torch.Generator().manual_seed(seed))
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _processor(image_size, patch_size).save_pretrained(path)
    return path


@torch.no_grad()
def draw_weights(model: LlavaForConditionalGeneration, layers: int, generator: torch.Generator) -> None:
    """Attention scores and logits of standard deviation 2 to 3; norms and biases off their defaults."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.named_parameters():
        if name.startswith("lm_head") and tied:
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
        elif name.endswith("bias"):
            weight.copy_(0.2 * noise)
        elif "embed_tokens" in name:
            weight.copy_((2 / weight.shape[1] ** 0.5 if tied else 1.0) * noise)
        elif "embedding" in name and weight.ndim < 4:  # class and position embeddings
            weight.copy_(0.5 * noise)
        else:
            gain = 1.0
            if "q_proj" in name or "k_proj" in name:
                gain = 1.7
            elif "o_proj" in name or "down_proj" in name:
                gain = 2.0 / (2 * layers) ** 0.5
            elif "lm_head" in name or "projector.linear_2" in name:
                gain = 2.0
            weight.copy_(gain * noise / weight[0].numel() ** 0.5)


def noise_image(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    """A colourful image of coarse random blocks; `size` is (height, width)."""
    blocks_HW3 = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks_HW3).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def tiny_inputs(
    path: Path | str, question: str = "what is the color of w3 ?", *, images: int = 1, seed: int = 0
) -> dict[str, Any]:
    """What AutoProcessor gives for `images` noise images and a question in the checkpoint's template."""
    from transformers import AutoProcessor

    prompt = f"USER: {'<image> ' * images}{question} ASSISTANT:"
    pictures = [noise_image(seed * 100 + number) for number in range(images)]
    return dict(
        AutoProcessor.from_pretrained(path)(images=pictures or None, text=prompt, return_tensors="pt")
    )


def _processor(image_size: int, patch_size: int) -> LlavaProcessor:
    words = [*SPECIAL, *WORDS]
    words += [f"w{number}" for number in range(VOCAB - len(words))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.25, 0.3, 0.35],
        ),
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_bundle(directory: Path, decisions: Mapping[str, Decisions], *, layers: int) -> Path:
    """A float32 bundle of a tiny LLaVA with a profile for each entry of `decisions`."""
    from trimvlm_export.checkpoint import model_spec
    from trimvlm_export.export import export

    checkpoint = tiny_llava(directory / "checkpoint", layers=layers)
    model = model_spec(checkpoint)
    for name, each in decisions.items():
        profile = Profile(name=name, method=Method(name=name), model=model, decisions=each)
        export(checkpoint, profile, directory / "bundle")
    return directory / "bundle"
