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

    The tokenizer is the checkpoint's `tokenizer.json`, or where `tokenizer_json` gives another, that.

    Raises:
        UserError: no tokenizer, one that does not tokenize as transformers does, no image token in it, or a
            chat template that is missing or cannot be frozen into pieces of text.
    """
    checkpoint = Path(checkpoint)
    config, processor = load_config(checkpoint), _load(checkpoint)
    token, wanted = getattr(processor, "image_token", None), _image_token_id(config)
    tokenizer, _ = _tokenizer(checkpoint, processor, token, wanted)
    if token is None or wanted is None or _ids(tokenizer, token) != [wanted]:
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


def tokenizer_json(checkpoint: Path | str) -> str | None:
    """The `tokenizer.json` that a bundle needs in place of the checkpoint's: transformers' own, where the
    checkpoint has none, or one without the image token. None: the checkpoint's is right.

    Raises:
        UserError: no tokenizer.
    """
    checkpoint = Path(checkpoint)
    config, processor = load_config(checkpoint), _load(checkpoint)
    token = getattr(processor, "image_token", None)
    tokenizer, made = _tokenizer(checkpoint, processor, token, _image_token_id(config))
    return tokenizer.to_str(pretty=True) if made else None


def _load(checkpoint: Path) -> Any:
    """The processor; without a tokenizer.json it is the first to miss it."""
    try:
        return load_processor(checkpoint)
    except UserError:
        if (checkpoint / TOKENIZER).is_file() or not (checkpoint / "config.json").is_file():
            raise
        raise UserError(
            f"{checkpoint}: no {TOKENIZER}; write one with transformers: "
            "AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
        ) from None


def _tokenizer(
    checkpoint: Path, processor: Any, token: str | None, wanted: int | None
) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it is the processor's instead of the checkpoint's file."""
    path, backend = checkpoint / TOKENIZER, getattr(processor.tokenizer, "backend_tokenizer", None)
    stored = load_tokenizer(path) if path.is_file() else None
    if stored is not None and (backend is None or token is None or _ids(stored, token) == [wanted]):
        return stored, False
    if backend is None:
        raise UserError(f"{checkpoint}: no {TOKENIZER}, and no way to make one; take another tokenizer")
    made = Tokenizer.from_str(backend.to_str())
    made.no_truncation()
    made.no_padding()
    return made, True


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


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
