"""What published checkpoints hold beside weights: chat template, special tokens, processor settings.

`from published_checkpoints import PUBLISHED, write`: each is written as a directory with a small tokenizer of
the right kind and no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from image_families import (
    NEXT_CANVASES,
    ONEVISION_CANVASES,
    internvl_processor,
    next_processor,
    onevision_processor,
)
from published_templates import INTERNVL, LLAMA3, MISTRAL, ONEVISION, QWEN, VICUNA
from small_tokenizers import byte_level, sentencepiece
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil


@dataclass(frozen=True)
class Published:
    """One kind of checkpoint.

    Attributes:
        template: chat template.
        tokenizer: of `small_tokenizers`.
        tokens: special tokens beside those of the tokenizer, in the order of their ids.
        named: those that the tokenizer's configuration names.
        config: `config.json`; what `image_token` names there is put in under `image_token_key`.
        processor: `processor_config.json`.
        images: makes the image processor.
    """

    template: str
    tokenizer: Callable[[], Tokenizer]
    config: dict[str, Any]
    processor: dict[str, Any]
    images: Callable[[], Any]
    tokens: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    image_token: str = "<image>"
    image_token_key: str = "image_token_index"


CLIP_TOWER = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
SIGLIP_TOWER = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
CHATML = ("<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
INTERN = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def _clip() -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def _llava(**changes: Any) -> Published:
    patches = {
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    return Published(
        **{
            "template": VICUNA,
            "tokenizer": sentencepiece,
            "config": {"model_type": "llava", "vision_config": CLIP_TOWER},
            "processor": {"processor_class": "LlavaProcessor", **patches},
            "images": _clip,
            **changes,
        }
    )


def _next(**changes: Any) -> Published:
    whole = _llava()
    canvases = {"image_grid_pinpoints": [list(canvas) for canvas in NEXT_CANVASES]}
    return _llava(
        **{
            "config": {**whole.config, "model_type": "llava_next", **canvases},
            "processor": {**whole.processor, "processor_class": "LlavaNextProcessor"},
            "images": next_processor,
            **changes,
        }
    )


def _qwen(model_type: str, processor: str) -> Published:
    return Published(
        template=QWEN,
        tokenizer=byte_level,
        tokens=(*CHATML, *VISION),
        config={"model_type": model_type, "vision_config": {}},
        processor={"processor_class": processor},
        images=Qwen2VLImageProcessorPil,
        image_token="<|image_pad|>",
        image_token_key="image_token_id",
    )


PUBLISHED = {
    "llava-1.5": _llava(),
    "llava-next-vicuna": _next(),
    "llava-next-mistral": _next(template=MISTRAL),
    "llava-next-llama3": _next(
        template=LLAMA3,
        tokenizer=byte_level,
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llava-onevision": Published(
        template=ONEVISION,
        tokenizer=byte_level,
        tokens=(*CHATML, "<video>"),
        config={
            "model_type": "llava_onevision",
            "vision_config": SIGLIP_TOWER,
            "image_grid_pinpoints": [list(canvas) for canvas in ONEVISION_CANVASES],
            "vision_aspect_ratio": "anyres_max_9",
        },
        processor={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": 729,
            "vision_feature_select_strategy": "full",
        },
        images=onevision_processor,
    ),
    "internvl3": Published(
        template=INTERNVL,
        tokenizer=byte_level,
        tokens=(*CHATML, *INTERN.values()),
        named=INTERN,
        config={
            "model_type": "internvl",
            "vision_config": {"model_type": "internvl_vision"},
            "downsample_ratio": 0.5,
        },
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 256},
        images=internvl_processor,
        image_token="<IMG_CONTEXT>",
        image_token_key="image_token_id",
    ),
    "qwen2-vl": _qwen("qwen2_vl", "Qwen2VLProcessor"),
    "qwen2.5-vl": _qwen("qwen2_5_vl", "Qwen2_5_VLProcessor"),
}


def write(name: str, path: Path) -> Path:
    """Writes one of them to a new directory."""
    published = PUBLISHED[name]
    tokenizer = published.tokenizer()
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in published.tokens]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if published.tokenizer is sentencepiece else None,
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=published.named,
    ).save_pretrained(path)
    published.images().save_pretrained(path)
    config = {
        **published.config,
        "text_config": {"model_type": "llama", "eos_token_id": 2},
        published.image_token_key: tokenizer.token_to_id(published.image_token),
    }
    if published.config["model_type"].startswith("qwen"):
        config.pop("text_config")
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (path / "processor_config.json").write_text(json.dumps(published.processor))
    (path / "chat_template.jinja").write_text(published.template)
    return path
