"""Freezes a checkpoint's tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec.structs import replace
from tokenizers import Tokenizer

from trimvlm.bundle import PromptTemplate, TextProcessing
from trimvlm.errors import UserError
from trimvlm.text import Turn, encode, load_tokenizer, render
from trimvlm_export.processing.chat_template import freeze_template, not_frozen, render_by_template
from trimvlm_export.processing.image_text import ImageText
from trimvlm_export.processing.load import load, load_config, load_processor

TOKENIZER = "tokenizer.json"

# What templates are known to alter: spaces at the ends, markup, braces, line ends.
TEXTS = ("What is it?", "  a <b> & 'c' {{ d }}\n\nline ", "Wie groß\u200b ist 猫?")


def text_processing(checkpoint: Path | str) -> TextProcessing:
    """The checkpoint's tokenization, end-of-sequence ids and chat template.

    Raises:
        UserError: no `tokenizer.json`, one that does not tokenize as transformers does, no image token in it,
            or a chat template that is missing or cannot be frozen into pieces of text.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / TOKENIZER).is_file():
        raise UserError(
            f"{checkpoint}: no {TOKENIZER}; write one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        )
    config, processor = load_config(checkpoint), load_processor(checkpoint)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    token, wanted = getattr(processor, "image_token", None), _image_token_id(config)
    if token is None or wanted is None or tokenizer.encode(token, add_special_tokens=False).ids != [wanted]:
        raise UserError(
            f"{checkpoint}: the tokenizer does not make the one id {wanted} (config.json) of the image token "
            f"{token!r}; correct tokenizer.json or config.json"
        )
    template = freeze_template(processor, source=str(checkpoint))
    if template.image.count(token) != 1 or token in template.start + template.user_start + template.generate:
        raise UserError(
            f"{checkpoint}: the chat template must write {token} once for each image and nowhere else; it "
            f"writes {template.image!r} for one; correct chat_template.jinja"
        )
    image = ImageText(processor, token, wanted, source=str(checkpoint))
    frozen = replace(template, image=template.image.replace(token, image.written))
    _prove(checkpoint, tokenizer, image, frozen)
    return TextProcessing(
        tokenizer=TOKENIZER,
        image_token=token,
        image_token_id=wanted,
        eos_ids=_eos_ids(checkpoint, config),
        template=frozen,
    )


def _prove(checkpoint: Path, tokenizer: Tokenizer, image: ImageText, template: PromptTemplate) -> None:
    """Compares renderings and ids with transformers for 0 to 3 images, one to three turns; for some, the ids
    that come with the images' pixels too."""
    processor = image.processor
    bos = processor.tokenizer.bos_token
    for text in TEXTS:
        for images in range(4):
            last = Turn(text=text, images=images)
            before = Turn(text=text, images=images, answer=text)
            for turns in ([last], [before, Turn(text=TEXTS[0])], [before, before, last]):
                theirs = render_by_template(processor, turns, True)
                ours = render(template, turns)
                written = theirs.replace(image.token, image.written)
                if ours != written:
                    raise not_frozen(str(checkpoint), text)
                special = not (bos and theirs.startswith(bos))
                ids = encode(tokenizer, ours)
                same = ids == processor.tokenizer(written, add_special_tokens=special).input_ids
                if same and images and text == TEXTS[0]:
                    count = sum(turn.images for turn in turns)
                    same = ids == image.ids(theirs, count, special=special)
                if not same:
                    raise UserError(
                        f"{checkpoint}: {TOKENIZER} does not tokenize {ours!r} as transformers does; write "
                        "it anew: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
                    )


def _image_token_id(config: Any) -> int | None:
    """What stands for images, whatever the family calls it."""
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def _eos_ids(checkpoint: Path, config: Any) -> tuple[int, ...]:
    """End-of-sequence ids that `generate` would use: of generation_config.json, else of the text model."""
    if (checkpoint / "generation_config.json").is_file():
        ids = load("GenerationConfig", checkpoint).eos_token_id
    else:
        ids = config.get_text_config().eos_token_id
    if ids is None:
        raise UserError(f"{checkpoint}: no eos_token_id in generation_config.json; answers would never end")
    return (ids,) if isinstance(ids, int) else tuple(ids)
