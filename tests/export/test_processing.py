"""Freezing a checkpoint's processing: what comes out, that it is transformers' own, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import noise_image, tiny_llava
from tokenizers import Tokenizer, normalizers

from trimvlm.bundle import PromptTemplate
from trimvlm.errors import UserError
from trimvlm.image_processing import SingleView
from trimvlm.images import make_preprocessor
from trimvlm.text import Turn, encode, load_tokenizer, place, render
from trimvlm_export.processing import image_processing, text_processing

# llava-hf/llava-1.5-7b-hf, shortened by its comments.
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}"
    "{% endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PARTS = (
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}"
)
VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. {% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: " + PARTS + " {% else %}ASSISTANT: " + PARTS + "</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] "
    + PARTS
    + " [/INST]{% else %} "
    + PARTS
    + "{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
    + PARTS
    + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("tiny") / "model", image_size=32, patch_size=8)


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None takes one out."""
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def change_image_processor(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "processor_config.json"
    data = json.loads(path.read_text())
    data["image_processor"].update(changes)
    path.write_text(json.dumps(data))


def messages(turns: list[Turn]) -> list[dict[str, Any]]:
    said = []
    for turn in turns:
        images = [{"type": "image"}] * turn.images
        said.append({"role": "user", "content": [*images, {"type": "text", "text": turn.text}]})
        if turn.answer is not None:
            said.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return said


CONVERSATIONS = [[Turn(text="what is the color of w3 ?", images=images)] for images in range(4)] + [
    [Turn(text="what ?", images=1, answer="w3 w4"), Turn(text="where is w5 ?")],
    [Turn(text="a", images=2, answer="b"), Turn(text="c", images=1, answer=" d "), Turn(text="  e\nf ")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda turns: f"{len(turns)}x{turns[0].images}")
@pytest.mark.parametrize("template", [None, LLAVA_15, VICUNA, MISTRAL, CHATML])
def test_prompts_are_those_of_the_processor(template: str | None, turns: list[Turn], checkpoint: Path):
    """Text, ids and positions, from messages and pictures to what the model gets."""
    from transformers import AutoProcessor

    if template:
        (checkpoint / "chat_template.jinja").write_text(template)
    frozen = text_processing(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    ours = render(frozen.template, turns)
    assert ours == processor.apply_chat_template(messages(turns), add_generation_prompt=True)

    special = not ours.startswith("<s>")  # what apply_chat_template(tokenize=True) does
    pictures = [noise_image(number) for number in range(sum(turn.images for turn in turns))]
    theirs = np.array(
        processor(text=ours, images=pictures or None, add_special_tokens=special)["input_ids"][0]
    )
    tokenizer = load_tokenizer(checkpoint / frozen.tokenizer)
    prompt = place(encode(tokenizer, ours), frozen.image_token_id, 16)
    np.testing.assert_array_equal(np.flatnonzero(theirs == frozen.image_token_id), prompt.visual_positions)
    np.testing.assert_array_equal(theirs[prompt.text_positions], prompt.input_ids)
    assert len(theirs) == prompt.length
    assert theirs.tolist().count(1) == 1


def test_what_is_frozen(checkpoint: Path):
    frozen = text_processing(checkpoint)
    assert frozen.template == PromptTemplate(
        start="",
        user_start="USER: ",
        image="<image> ",
        user_end=" ",
        answer_start="ASSISTANT: ",
        answer_end=" ",
        generate="ASSISTANT:",
    )
    assert (frozen.tokenizer, frozen.image_token, frozen.image_token_id) == ("tokenizer.json", "<image>", 4)
    assert frozen.eos_ids == (2,)
    (checkpoint / "chat_template.jinja").write_text(CHATML)
    template = text_processing(checkpoint).template
    assert template.start == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert template.user_start == "<|im_start|>user\n" and template.answer_end == "<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("trims", VICUNA.replace("c['text']", "c['text'] | trim"), "cannot be frozen"),
        ("escapes", VICUNA.replace("c['text']", "c['text'] | e"), "cannot be frozen"),
        ("numbers its images", VICUNA.replace("<image>\n", "{{ loop.index }}<image>"), "cannot be frozen"),
        ("numbers its turns", VICUNA.replace("USER:", "USER {{ loop.index }}:"), "cannot be frozen"),
        ("writes the date", "{{ strftime_now('%d %b %Y') }}" + VICUNA, "today's date"),
        ("drops old turns", VICUNA.replace("in messages", "in messages[-1:]"), "cannot be frozen"),
        ("says text twice", VICUNA.replace("c['text']", "c['text'] + c['text']"), "cannot be frozen"),
        ("takes strings", "{% for m in messages %}{{ m['content'] + '' }}{% endfor %}", "fails on a convers"),
        ("is broken", "{% for m in messages %}", "fails on a conversation"),
        ("forgets images", VICUNA.replace("<image>\n", ""), "must write <image> once for each image"),
        ("doubles images", VICUNA.replace("<image>", "<image><image>"), "must write <image> once"),
    ],
)
def test_a_template_that_cannot_be_frozen(name: str, template: str, message: str, checkpoint: Path):
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=message) as caught:
        text_processing(checkpoint)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_without_a_template(checkpoint: Path):
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template; add chat_template\.jinja"):
        text_processing(checkpoint)


@pytest.mark.parametrize(("said", "ids"), [(7, (7,)), ([2, 9], (2, 9))])
def test_eos_ids(said: Any, ids: tuple[int, ...], checkpoint: Path):
    change(checkpoint / "generation_config.json", eos_token_id=said)
    assert text_processing(checkpoint).eos_ids == ids


def test_eos_ids_without_a_generation_config(checkpoint: Path):
    (checkpoint / "generation_config.json").unlink()
    assert text_processing(checkpoint).eos_ids == (2,)


def test_no_eos_at_all(checkpoint: Path):
    change(checkpoint / "generation_config.json", eos_token_id=None)
    with pytest.raises(UserError, match="no eos_token_id"):
        text_processing(checkpoint)


def test_tokenizers_that_are_refused(checkpoint: Path):
    path = checkpoint / "tokenizer.json"
    change(checkpoint / "config.json", image_token_index=5)
    with pytest.raises(UserError, match=r"does not make the one id 5 .* of the image token '<image>'"):
        text_processing(checkpoint)
    change(checkpoint / "config.json", image_token_index=4)
    path.unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        text_processing(checkpoint)


def test_a_tokenizer_file_that_transformers_does_not_follow(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some tokenizer classes rebuild their rules and leave those of tokenizer.json aside."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    made = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    made.normalizer = normalizers.Lowercase()
    made.save(str(checkpoint / "tokenizer.json"))
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    with pytest.raises(UserError, match=r"tokenizer\.json does not tokenize .* as transformers does"):
        text_processing(checkpoint)


def test_image_processing(checkpoint: Path):
    from transformers import AutoProcessor

    frozen = image_processing(checkpoint)
    assert frozen == SingleView(
        resize=32,
        resample=3,
        crop=(32, 32),
        rescale=1 / 255,
        mean=(0.5, 0.4, 0.3),
        std=frozen.std,
    )
    image = noise_image(3)
    theirs = AutoProcessor.from_pretrained(checkpoint).image_processor(images=image)
    np.testing.assert_allclose(make_preprocessor(frozen)(image), theirs["pixel_values"], atol=1e-2)


def test_an_exact_size_without_rescaling(checkpoint: Path):
    change_image_processor(
        checkpoint,
        size={"height": 32, "width": 32},
        do_center_crop=False,
        do_rescale=False,
        do_normalize=False,
    )
    frozen = image_processing(checkpoint)
    assert frozen.resize == (32, 32)
    assert (
        frozen.crop is None and frozen.rescale == 1 and frozen.mean == (0, 0, 0) and frozen.std == (1, 1, 1)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"crop_size": {"height": 40, "width": 32}},
            "makes 40 x 32 pixels, but the vision",
        ),
        ({"do_center_crop": False}, "makes images of several sizes"),
        ({"do_pad": True}, "do_pad is not supported"),
        ({"size": {"shortest_edge": 32, "longest_edge": 99}}, "is not supported, only shortest_edge"),
    ],
)
def test_image_processing_that_is_refused(changes: dict, message: str, checkpoint: Path):
    change_image_processor(checkpoint, **changes)
    with pytest.raises(UserError, match=message):
        image_processing(checkpoint)


def test_an_image_processor_that_does_something_of_its_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """The proof looks at pixels, not at options."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(checkpoint)
    whole = type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, images: whole(self, images=images.transpose(0)),  # mirrored
    )
    with pytest.raises(UserError, match="does more than its options say"):
        image_processing(checkpoint)


def test_a_directory_that_is_no_checkpoint(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for read in (image_processing, text_processing):
        with pytest.raises(UserError, match="transformers cannot load its Auto") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
