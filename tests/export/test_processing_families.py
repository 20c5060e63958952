"""Freezing the processing of every family, from directories as they are published, weights left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_families import INTERNVL, NEXT, ONEVISION, QWEN, photo
from PIL import Image
from published_checkpoints import PUBLISHED, write
from tiny_mobilevlm import tiny_mobilevlm
from transformers import AutoProcessor

from trimvlm.bundle import TextProcessing
from trimvlm.errors import UserError
from trimvlm.image_processing import SingleView
from trimvlm.images import make_preprocessor, natural_grid
from trimvlm.text import Turn, load_tokenizer, make_prompter, render
from trimvlm_export.processing import image_processing, load_processor, text_processing, tokenizer_json
from trimvlm_export.source import Source

CONVERSATIONS = {
    "no image": [Turn(text="What is in the picture?")],
    "one image": [Turn(text="What is in the picture?", images=1)],
    "two images": [Turn(text=" a\n\nb ", images=2)],
    "two turns": [Turn(text="the quick fox", images=1, answer="jumps, 猫"), Turn(text="over it?")],
    "images later": [
        Turn(text="a", answer="b"),
        Turn(text="c", images=2, answer=" d"),
        Turn(text="e", images=1),
    ],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write(name, tmp_path_factory.mktemp("published") / name) for name in PUBLISHED}


@pytest.fixture(scope="module")
def frozen(directories: dict[str, Path]) -> dict[str, TextProcessing]:
    return {name: text_processing(directory) for name, directory in directories.items()}


def messages(turns: list[Turn], picture: Image.Image) -> list[dict[str, Any]]:
    said = []
    for turn in turns:
        images = [{"type": "image", "image": picture}] * turn.images
        said.append({"role": "user", "content": [*images, {"type": "text", "text": turn.text}]})
        if turn.answer is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_those_of_the_processor(
    name: str, directories: dict[str, Path], frozen: dict[str, TextProcessing]
):
    """From messages and pictures to ids and positions."""
    text, processor = frozen[name], load_processor(directories[name])
    tokenizer = load_tokenizer(directories[name] / text.tokenizer)
    picture = photo(64, 64)
    for turns in CONVERSATIONS.values():
        rendered = processor.apply_chat_template(messages(turns, picture), add_generation_prompt=True)
        images = sum(turn.images for turn in turns)
        written = render(text.template, turns)
        if name == "internvl3":  # its processor puts marks around images after the template
            written = written.replace("<img>", "").replace("</img>", "")
        assert written == rendered

        special = not rendered.startswith("<s>")
        inputs = processor(text=[rendered], images=[picture] * images or None, add_special_tokens=special)
        theirs = np.array(inputs["input_ids"][0])
        is_image = theirs == text.image_token_id
        rows = int(is_image.sum()) // max(images, 1)
        ours = make_prompter(tokenizer, text, rows)(turns[-1].text, images, history=turns[:-1])
        np.testing.assert_array_equal(ours.visual_positions, np.flatnonzero(is_image))
        np.testing.assert_array_equal(ours.input_ids, theirs[~is_image])
        np.testing.assert_array_equal(ours.text_positions, np.flatnonzero(~is_image))
        assert images == 0 or rows > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_apply_chat_template(
    name: str, directories: dict[str, Path], frozen: dict[str, TextProcessing]
):
    """With its own tokenizing, for a conversation of one image."""
    text, processor = frozen[name], load_processor(directories[name])
    turns = CONVERSATIONS["two turns"]
    theirs = processor.apply_chat_template(
        messages(turns, photo(64, 64)), add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    prompter = make_prompter(load_tokenizer(directories[name] / text.tokenizer), text, 1)
    ours = prompter(turns[-1].text, 1, history=turns[:-1])
    assert [each for each in theirs if each != text.image_token_id] == ours.input_ids.tolist()
    assert theirs.index(text.image_token_id) == ours.visual_positions[0]


def test_pieces(frozen: dict[str, TextProcessing]):
    assert frozen["internvl3"].template.image == "<img><IMG_CONTEXT></img>\n"
    assert frozen["qwen2-vl"].template.image == "<|vision_start|><|image_pad|><|vision_end|>"
    assert frozen["qwen2-vl"].template.start == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert frozen["llava-onevision"].template.start == ""
    assert frozen["llava-next-mistral"].template.answer_end == "<\\s> "
    assert frozen["llava-next-mistral"].template.generate == ""
    llama3 = frozen["llava-next-llama3"].template
    assert (llama3.image, llama3.text_start) == ("<image>", "\n") and llama3.user_start.endswith("\n\n")
    assert {each.eos_ids for each in frozen.values()} == {(2, 0)}


FROZEN = {
    "llava-next-vicuna": NEXT,
    "llava-onevision": ONEVISION,
    "internvl3": INTERNVL,
    "qwen2-vl": QWEN,
    "qwen2.5-vl": QWEN,
}


@pytest.mark.parametrize("name", FROZEN)
def test_images(name: str, directories: dict[str, Path]):
    """And the whole processor makes the same pixels, with whatever it asks of the image processor."""
    frozen, processor = image_processing(directories[name]), load_processor(directories[name])
    assert frozen == FROZEN[name]
    image = photo(300, 160)
    theirs = np.asarray(processor(text=[processor.image_token], images=[image])["pixel_values"])
    ours = make_preprocessor(frozen, natural_grid(frozen, *image.size))(image)
    np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


def changed(name: str, path: Path, file: str, **changes: Any) -> Path:
    """A directory with keys of one file changed."""
    target = write(name, path / name) / file
    target.write_text(json.dumps({**json.loads(target.read_text()), **changes}))
    return target.parent


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        (
            "llava-next-vicuna",
            "preprocessor_config.json",
            {"image_grid_pinpoints": [[336, 672]]},
            "has image_grid_pinpoints .* but config.json .*; correct the one or the other",
        ),
        (
            "llava-next-vicuna",
            "preprocessor_config.json",
            {"size": {"shortest_edge": 224}},
            "has views of pixels 224, but config.json 336",
        ),
        ("llava-onevision", "config.json", {"vision_aspect_ratio": "pad"}, "vision_aspect_ratio 'pad' in"),
        ("internvl3", "preprocessor_config.json", {"size": {"height": 448, "width": 224}}, "only squares"),
        (
            "internvl3",
            "config.json",
            {"downsample_ratio": 0.25},
            "has as image_seq_length .* 256, but",
        ),
        ("qwen2-vl", "preprocessor_config.json", {"merge_size": 4}, "has merge_size 4, but config.json 2"),
        ("qwen2-vl", "preprocessor_config.json", {"patch_size": 16}, "has patch_size 16, but config.json 14"),
        (
            "llava-1.5",
            "preprocessor_config.json",
            {"image_processor_type": "ViTImageProcessor"},
            "ViTImageProcessorPil is not supported; supported: CLIPImageProcessor, Got",
        ),
    ],
)
def test_images_that_are_refused(name: str, file: str, changes: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as caught:
        image_processing(changed(name, tmp_path, file, **changes))
    assert "\n" not in str(caught.value)


def test_older_files_name_pixels_of_qwen_otherwise(tmp_path: Path):
    directory = changed(
        "qwen2-vl", tmp_path, "preprocessor_config.json", size=None, min_pixels=3136, max_pixels=50176
    )
    frozen: Any = image_processing(directory)
    assert (frozen.least, frozen.most) == (3136, 50176)


def test_a_processor_that_fails_on_images(tmp_path: Path):
    directory = changed("llava-next-vicuna", tmp_path, "processor_config.json", patch_size=None)
    with pytest.raises(UserError, match=r"LlavaNextProcessor fails on a text with images .*correct proc"):
        text_processing(directory)


def test_a_tokenizer_is_made_where_the_file_has_no_image_token(directories: dict[str, Path], tmp_path: Path):
    assert tokenizer_json(directories["llava-1.5"]) is None
    directory = write("llava-1.5", tmp_path / "model")
    plain = json.loads((directory / "tokenizer.json").read_text())
    plain["added_tokens"] = [each for each in plain["added_tokens"] if each["content"] != "<image>"]
    del plain["model"]["vocab"]["<image>"]
    options = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(plain))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**options, "extra_special_tokens": {"image_token": "<image>"}})
    )
    made = AutoProcessor.from_pretrained(directory).tokenizer
    config = json.loads((directory / "config.json").read_text())
    config["image_token_index"] = made.convert_tokens_to_ids("<image>")
    (directory / "config.json").write_text(json.dumps(config))
    frozen = text_processing(directory)
    assert frozen.image_token_id == config["image_token_index"]
    text = tokenizer_json(directory)
    assert text is not None
    (tmp_path / "tokenizer.json").write_text(text)
    ids = load_tokenizer(tmp_path / "tokenizer.json").encode("a <image> the", add_special_tokens=False).ids
    assert ids == made("a <image> the", add_special_tokens=False).input_ids
    assert frozen.image_token_id in ids


def test_a_published_mobilevlm_becomes_a_bundle_that_knows_its_image_token(tmp_path: Path):
    """It has no processor, no chat template and a tokenizer without `<image>`."""
    checkpoint = tiny_mobilevlm(tmp_path / "checkpoint")
    Source.place(checkpoint, tmp_path / "bundle", "float32")
    placed = tmp_path / "bundle" / "checkpoint"
    frozen = text_processing(checkpoint)
    assert text_processing(placed) == frozen and tokenizer_json(placed) is None
    tokenizer = load_tokenizer(placed / frozen.tokenizer)
    assert frozen.template.image == "<image>\n"
    assert tokenizer.encode("<image>", add_special_tokens=False).ids == [frozen.image_token_id]
    processing = image_processing(checkpoint)
    assert isinstance(processing, SingleView) and processing.square
