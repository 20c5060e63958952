"""MobileVLM-V2 checkpoints: strict loading of published names, refusals, images and prompts as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_mobilevlm import TOKENS, tiny_config, tiny_mobilevlm
from tiny_models import noise_image
from tokenizers import Tokenizer
from transformers import AutoProcessor

from trimvlm.errors import UserError
from trimvlm_export import checkpoint as checkpoints
from trimvlm_export.mobilevlm import MobileVLMForConditionalGeneration, MobileVLMProcessor, processor

IMAGE = len(TOKENS)  # the first id after the vocabulary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mobilevlm(tmp_path_factory.mktemp("mobilevlm") / "model", shards=3)


def changed(checkpoint: Path, directory: Path, **tensors: torch.Tensor | None) -> Path:
    """The checkpoint in one file, with other tensors; None takes one away."""
    directory.mkdir()
    whole = {
        name: each for file in checkpoint.glob("*.safetensors") for name, each in load_file(file).items()
    }
    kept = {name: each for name, each in (whole | tensors).items() if each is not None}
    save_file(kept, directory / "model.safetensors")
    (directory / "config.json").write_text((checkpoint / "config.json").read_text())
    return directory


def test_one_file_equals_shards_and_saves_again(checkpoint: Path, tmp_path: Path) -> None:
    model = MobileVLMForConditionalGeneration.from_pretrained(checkpoint)
    alone = MobileVLMForConditionalGeneration.from_pretrained(changed(checkpoint, tmp_path / "one"))
    alone.save_pretrained(tmp_path / "saved")
    saved = MobileVLMForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float16)
    for name, weight in model.state_dict().items():
        assert torch.equal(alone.state_dict()[name], weight)
        assert torch.equal(saved.state_dict()[name], weight.half())
    assert saved.config.text_config.to_dict() == model.config.text_config.to_dict()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"model.mm_projector.peg.peg.0.bias": None},
            "no tensor for model.multi_modal_projector.position.bias",
        ),
        (
            {"model.mm_projector.mlp.mlp.2.weight": torch.ones(64, 32)},
            r"is \[64, 32\], the model needs \[64, 64\]",
        ),
        ({"model.mm_projector.peg.peg.1.bias": torch.ones(64)}, "peg.peg.1.bias is not used"),
        ({"model.norm.weight": None}, "no tensor for model.language_model.norm.weight"),
    ],
)
def test_loading_is_strict(checkpoint: Path, tmp_path: Path, tensors: Any, message: str) -> None:
    directory = changed(checkpoint, tmp_path / "model", **tensors)
    with pytest.raises(UserError, match=message):
        MobileVLMForConditionalGeneration.from_pretrained(directory)


def test_a_checkpoint_without_its_tower_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    names = [n for file in checkpoint.glob("*.safetensors") for n in load_file(file) if "vision_tower" in n]
    directory = changed(checkpoint, tmp_path / "model", **dict.fromkeys(names))
    with pytest.raises(UserError, match="save the whole model, tower included"):
        MobileVLMForConditionalGeneration.from_pretrained(directory)


def test_pickled_weights_are_never_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model.bin.*save_file\(torch.load"):
        MobileVLMForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "ldpnet"}, "mm_projector_type: 'ldpnet' is not supported, only 'ldpnetv2'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio: 'anyres'"),
        ({"mm_hidden_size": 48}, "mm_hidden_size: 48"),
        ({"vision_config": None}, "mm_vision_tower: the geometry of 'tiny' is not known"),
    ],
)
def test_other_checkpoints_are_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory = changed(checkpoint, tmp_path / "model")
    config = {**tiny_config(), **change}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        checkpoints.model_spec(directory)


@pytest.mark.parametrize("size", [(40, 48), (31, 90), (96, 20), (7, 7)])
def test_images_are_padded_in_the_mean_colour(checkpoint: Path, size: tuple[int, int]) -> None:
    image = noise_image(3, size)
    made: Any = processor(checkpoint)
    found = made.image_processor(images=image, return_tensors="np")["pixel_values"][0]
    side = max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - size[1]) // 2, (side - size[0]) // 2))
    square = square.resize((96, 96), Image.Resampling.BICUBIC)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    wanted = (np.asarray(square) / 255 - mean) / std
    np.testing.assert_allclose(found, wanted.transpose(2, 0, 1), atol=1.01 / 255 / min(std))


def test_prompts_are_tokenized_around_images(checkpoint: Path) -> None:
    """Each piece as a text of its own: a space first, `<s>` once, as sentencepiece does it."""
    made: Any = processor(checkpoint)
    image, text = {"type": "image"}, {"type": "text", "text": "Hi\n?"}
    turns = [
        {"role": "user", "content": [image, image, text]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "a  b"}]},
    ]
    prompt = made.apply_chat_template(turns, add_generation_prompt=True)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert prompt == (f"{system} USER: <image>\n<image>\nHi\n? ASSISTANT: no</s>USER: a  b ASSISTANT:")
    pieces = [f"{system} USER: ", "\n", "\nHi\n? ASSISTANT: no", "USER: a  b ASSISTANT:"]

    def spelled(piece: str) -> list[int]:
        return [TOKENS.index({" ": "▁", "\n": "<0x0A>"}.get(letter, letter)) for letter in f" {piece}"]

    first, second, third, fourth = map(spelled, pieces)
    wanted = [1, *first, IMAGE, *second, IMAGE, *third, 2, *fourth]
    assert made.tokenizer(prompt).input_ids == wanted
    expanded = made(images=[noise_image(0), noise_image(1)], text=prompt).input_ids[0]
    assert expanded == [1, *first, *[IMAGE] * 144, *second, *[IMAGE] * 144, *third, 2, *fourth]
    assert len(made.tokenizer) == len(TOKENS) + 1


def test_a_saved_processor_is_the_same_one(checkpoint: Path, tmp_path: Path) -> None:
    """And its tokenizer.json alone makes the same ids, which is what a device reads."""
    made: Any = processor(checkpoint)
    made.image_processor.image_mean = [0.5, 0.25, 0.125]
    directory = changed(checkpoint, tmp_path / "model")
    made.save_pretrained(directory)
    again: Any = AutoProcessor.from_pretrained(directory, local_files_only=True)
    assert type(again) is MobileVLMProcessor and again.chat_template == made.chat_template
    prompt, images = "USER: <image>\n  Hi <image> x</s>USER: 猫", [noise_image(1), noise_image(2, (50, 20))]
    theirs, ours = (each(images=images, text=prompt, return_tensors="np") for each in (made, again))
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["pixel_values"], theirs["pixel_values"])
    alone = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert alone.encode(prompt).ids == made.tokenizer(prompt).input_ids


def test_a_tokenizer_of_another_size_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    directory = changed(checkpoint, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_text((checkpoint / name).read_text())
    config = tiny_config() | {"vocab_size": IMAGE + 5}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"gives <image> the id {IMAGE}, but config.json wants {IMAGE + 5}"):
        processor(directory)
