"""Tiny random checkpoints of the families that cut images into tiles: `from tiny_tiled import tiny_next`.

LLaVA-NeXT, LLaVA-OneVision and InternVL with tokenizer, image processor and chat template, written as a
user's would be. Weights as in `tiny_models`: a wrong computation shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCAB, WORDS, draw_weights
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHAT_TEMPLATE = (
    "{{% for m in messages %}}{{% if m['role']=='user' %}}USER: {{% for c in m['content'] %}}"
    "{{% if c['type']=='image' %}}{image} {{% else %}}{{{{ c['text'] }}}} {{% endif %}}{{% endfor %}}"
    "{{% else %}}ASSISTANT: {{{{ m['content'][0]['text'] }}}} {{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}ASSISTANT:{{% endif %}}"
)
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.3, 0.35]


def tiny_next(path: Path | str, *, view: int = 32, tower: str = "clip", **options: Any) -> Path:
    """A LLaVA-NeXT: views of `view` pixels in patches of 8, and the canvases of the published models.

    Args:
        path: directory to write, made where missing.
        tower: `clip`, or `siglip` with features of two layers, as Granite Vision has it.
        options: see `_write`.
    """
    vision = _vision(view)
    if tower == "clip":
        vision = transformers.CLIPVisionConfig(**vision, hidden_act="gelu", projection_dim=32)
        features = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    else:
        vision = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
        features = {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"}
    canvases = [[view * rows, view * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    image_processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": view},
        crop_size={"height": view, "width": view},
        image_grid_pinpoints=canvases,
        image_mean=MEAN,
        image_std=STD,
    )
    processor = {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 8,
        "vision_feature_select_strategy": features["vision_feature_select_strategy"],
        "num_additional_image_tokens": int(tower == "clip"),
    }
    config = {**features, "image_grid_pinpoints": canvases, "image_token_index": len(SPECIAL)}
    return _write(
        path,
        "LlavaNext",
        {"vision_config": vision, **config},
        [image_processor, _tokenizer("<image>", image_token="<image>")],
        processor,
        **options,
    )


def tiny_onevision(path: Path | str, *, view: int = 29, most: int = 4, **options: Any) -> Path:
    """A LLaVA-OneVision: views of `view` pixels, which patches of 8 do not fill, and up to 4 x 4 tiles.

    Args:
        path: directory to write, made where missing.
        most: views' worth of tokens above which they are thinned out.
        options: see `_write`.
    """
    vision = transformers.SiglipVisionConfig(**_vision(view), vision_use_head=False)
    canvases = [[view * rows, view * columns] for rows in range(1, 5) for columns in range(1, 5)]
    image_processor = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": view, "width": view}, image_grid_pinpoints=canvases, image_mean=MEAN, image_std=STD
    )
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": (view // 8) ** 2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": f"anyres_max_{most}",
    }
    config = {
        "vision_config": vision,
        "image_grid_pinpoints": canvases,
        "vision_aspect_ratio": f"anyres_max_{most}",
        "image_token_index": len(SPECIAL),
        "video_token_index": len(SPECIAL) + 1,
    }
    tokenizer = _tokenizer("<image>", image_token="<image>", video_token="<video>")
    return _write(
        path, "LlavaOnevision", config, [image_processor, tokenizer], processor, qwen2=True, **options
    )


def tiny_internvl(
    path: Path | str,
    *,
    view: int = 48,
    rms_norm: bool = False,
    qk_norm: bool = False,
    mean_pooling: bool = True,
    most: int = 6,
    **options: Any,
) -> Path:
    """An InternVL: views of `view` pixels in patches of 8, 2 x 2 of which make a token.

    Args:
        path: directory to write, made where missing.
        rms_norm, qk_norm: as the large towers have; otherwise layer norms, and none on queries and keys.
        mean_pooling: without it the tower has a final norm.
        most: tiles of one image.
        options: see `_write`.
    """
    vision = transformers.InternVLVisionConfig(
        **{**_vision(view), "image_size": [view, view], "patch_size": [8, 8]},
        norm_type="rms_norm" if rms_norm else "layer_norm",
        use_qk_norm=qk_norm,
        use_mean_pooling=mean_pooling,
        use_mask_token=True,
        attention_bias=not qk_norm,
    )
    image_processor = transformers.GotOcr2ImageProcessorPil(
        size={"height": view, "width": view},
        crop_to_patches=True,
        max_patches=most,
        image_mean=MEAN,
        image_std=STD,
    )
    tokenizer = _tokenizer(
        "<IMG_CONTEXT>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    length = (view // 16) ** 2
    config = {
        "vision_config": vision,
        "image_token_id": len(SPECIAL) + 2,
        "image_seq_length": length,
        "downsample_ratio": 0.5,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": length}
    return _write(
        path, "InternVL", config, [image_processor, tokenizer], processor, **{"qwen2": True, **options}
    )


def _write(
    path: Path | str,
    name: str,
    config: dict[str, Any],
    parts: list[Any],
    processor: dict[str, Any],
    *,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    qwen2: bool = False,
    tie: bool = False,
    old_names: bool = True,
    shard: str = "1GB",
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Draws the weights and saves everything; returns `path`.

    Args:
        name: what transformers' classes of this family begin with.
        config: options of the model's configuration beside the text model's.
        parts: image processor and tokenizer.
        processor: `processor_config.json`, written as published: transformers' own processors with videos
            cannot be made without torchvision.
        qwen2: the text model is a Qwen2 instead of a Llama.
        tie: the LM head shares the token embeddings.
        old_names: tensors named as published, otherwise as transformers' modules are.
        shard: largest size of a weight file.
        dtype: torch dtype name that the weights are saved in.
    """
    text = (transformers.Qwen2Config if qwen2 else transformers.LlamaConfig)(
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        max_position_embeddings=1024,
        tie_word_embeddings=tie,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    whole = getattr(transformers, f"{name}Config")(text_config=text, tie_word_embeddings=tie, **config)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(whole).eval()
    draw_weights(model, layers, torch.Generator().manual_seed(seed))
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, 2, 0
    model.to(getattr(torch, dtype)).save_pretrained(
        path, save_original_format=old_names, max_shard_size=shard
    )
    for part in parts:
        part.save_pretrained(path)
    path = Path(path)
    (path / "processor_config.json").write_text(json.dumps(processor))
    return path


def _vision(view: int) -> dict[str, Any]:
    """What the towers' configurations share."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": view,
        "patch_size": 8,
    }


def _tokenizer(image: str, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    """Words as in `tiny_models`, after the special ones; `image` is what a template writes for an image."""
    special = [*SPECIAL, *tokens.values()]
    words = [*special, *WORDS]
    words += [f"w{number}" for number in range(VOCAB - len(words))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=tokens,
        chat_template=CHAT_TEMPLATE.format(image=image),
    )
