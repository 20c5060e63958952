"""Prompts: positions, templates, image tokens, and equality with transformers' processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from small_tokenizers import KINDS

from trimvlm.bundle import PromptTemplate, TextProcessing
from trimvlm.errors import UserError
from trimvlm.text import Turn, encode, load_tokenizer, make_prompter, place, render

IMAGE = 4
VICUNA = PromptTemplate(
    start="",
    user_start="USER: ",
    image="<image>\n",
    user_end=" ",
    answer_start="ASSISTANT: ",
    answer_end=" ",
    generate="ASSISTANT:",
)


def prompter(kind: str = "word_level", rows: int = 6):
    processing = TextProcessing(
        tokenizer="tokenizer.json", image_token="<image>", image_token_id=IMAGE, eos_ids=(2,), template=VICUNA
    )
    return make_prompter(KINDS[kind](), processing, rows)


@given(st.lists(st.integers(0, 7), max_size=30), st.integers(1, 9))
def test_positions(ids: list[int], rows: int):
    prompt = place(ids, IMAGE, rows)
    images = ids.count(IMAGE)
    assert prompt.input_ids.tolist() == [i for i in ids if i != IMAGE]
    assert len(prompt.visual_positions) == images * rows
    everything = np.concatenate([prompt.text_positions, prompt.visual_positions])
    assert sorted(everything.tolist()) == list(range(prompt.length))
    assert prompt.length == len(ids) - images + images * rows
    for positions in (prompt.text_positions, prompt.visual_positions):
        assert positions.dtype == np.int64 and np.all(np.diff(positions) > 0)
    for block in prompt.visual_positions.reshape(images, rows):
        assert np.all(np.diff(block) == 1)
    # Writing the ids back to their positions gives the sequence with every image token repeated.
    full = np.full(prompt.length, IMAGE)
    full[prompt.text_positions] = prompt.input_ids
    assert full.tolist() == [i for token in ids for i in [token] * (rows if token == IMAGE else 1)]


def test_positions_by_hand():
    prompt = place([1, 5, IMAGE, 7, IMAGE, IMAGE, 8], IMAGE, 3)
    assert prompt.text_positions.tolist() == [0, 1, 5, 12]
    assert prompt.visual_positions.tolist() == [2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert prompt.length == 13


def test_render():
    assert render(VICUNA, [Turn(text="Hi")]) == "USER: Hi ASSISTANT:"
    assert render(VICUNA, [Turn(text="And?", images=2)]) == "USER: <image>\n<image>\nAnd? ASSISTANT:"
    assert (
        render(VICUNA, [Turn(text="a", images=1, answer="b"), Turn(text="c", images=1)])
        == "USER: <image>\na ASSISTANT: b USER: <image>\nc ASSISTANT:"
    )
    after = structs.replace(VICUNA, image="<image>", text_start="\n")  # images lie before it, and so it stays
    assert render(after, [Turn(text="a", images=2, answer="b"), Turn(text="c")]) == (
        "USER: <image><image>\na ASSISTANT: b USER: \nc ASSISTANT:"
    )


def test_special_tokens_are_never_added_twice():
    tokenizer = KINDS["word_level"]()
    assert encode(tokenizer, "a ?") == [1, 10, 13]
    assert encode(tokenizer, "<s> a ?") == [1, 10, 13]
    assert encode(KINDS["byte_level"](), "a")[0] != 1


def test_images_of_the_history_come_first():
    prompt = prompter()("is", 3, history=[Turn(text="What", answer="red", images=2)])
    # <s> USER: (image) (image) What ASSISTANT: red USER: (image) is ASSISTANT:
    assert prompt.input_ids.tolist() == [1, 5, 7, 6, 11, 5, 8, 6]
    assert prompt.visual_positions.tolist() == [*range(2, 14), *range(18, 24)]


def test_text_alone():
    prompt = prompter()("is")
    assert prompt.input_ids.tolist() == [1, 5, 8, 6] and prompt.visual_positions.shape == (0,)


def test_raw_is_taken_as_it_stands():
    prompt = prompter()("red <image> is <image> a", 2, raw=True)
    assert prompt.input_ids.tolist() == [1, 11, 8, 10]
    assert prompt.visual_positions.tolist() == [*range(2, 8), *range(9, 15)]


@pytest.mark.parametrize(
    ("text", "images", "options", "message"),
    [
        ("a <image>", 1, {}, "holds the image token <image> itself; leave it out"),
        ("a", 2, {"history": [Turn(text="<image> b", answer="c")]}, "holds the image token"),
        ("a", 2, {"history": [Turn(text="b", answer="<image>")]}, "holds the image token"),
        ("<image> a", 2, {"raw": True}, "has 1 image token <image> for 2 images"),
        ("<image> <image> a", 1, {"raw": True}, "has 2 image tokens <image> for 1 image;"),
        ("<image> a", 0, {"raw": True}, "has 1 image token <image> for 0 images"),
        ("a", 1, {"raw": True}, "has 0 image tokens"),
        ("a <image>", 1, {"raw": True}, "does not end in text"),
        (
            "a",
            1,
            {"history": [Turn(text="b", answer="c", images=2)]},
            "has 2 images, but 1 are given",
        ),
        ("a", 1, {"history": [Turn(text="b", images=1)]}, "history: turn 0 has no answer"),
        ("a", 0, {"raw": True, "history": [Turn(text="b", answer="c")]}, "leave history out"),
    ],
)
def test_refused(text: str, images: int, options: dict, message: str):
    with pytest.raises(UserError, match=message):
        prompter()(text, images, **options)


def test_a_negative_number_of_images_is_refused():
    with pytest.raises(UserError, match=r"turn\.images: -1"):
        Turn(text="a", images=-1)


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "1.0", "model": {"type": "of tomorrow"}}')
    with pytest.raises(UserError, match=r"tokenizer\.json: tokenizers .* cannot read it"):
        load_tokenizer(path)


def test_truncation_and_padding_are_switched_off(tmp_path: Path):
    tokenizer = KINDS["word_level"]()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path / "tokenizer.json"), "a red circle ? a") == [1, 10, 11, 12, 13, 10]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_ids_are_those_of_transformers_processor(kind: str, images: int, tmp_path: Path):
    """The processor repeats each image token N times before it tokenizes; we place rows afterwards."""
    from transformers import AutoImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    image_processor = AutoImageProcessor.from_pretrained(write_image_processor(tmp_path))
    made = KINDS[kind]()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )
    image_id = made.token_to_id("<image>")
    rows = 4  # 16 x 16 pixels in patches of 8
    for text in ("What is the red circle ?", " the  red\ncircle", "🙂 猫"):
        for whole in (render(VICUNA, [Turn(text=text, images=images)]), "<image>" * images + text):
            pictures = [np.zeros((16, 16, 3), np.uint8)] * images
            theirs = np.array(processor(text=whole, images=pictures)["input_ids"][0])
            prompt = place(encode(made, whole), image_id, rows)
            np.testing.assert_array_equal(np.flatnonzero(theirs == image_id), prompt.visual_positions)
            np.testing.assert_array_equal(theirs[prompt.text_positions], prompt.input_ids)
            assert len(theirs) == prompt.length


def write_image_processor(directory: Path) -> Path:
    from transformers import CLIPImageProcessor

    size = {"shortest_edge": 16}
    CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16}).save_pretrained(directory)
    return directory
