"""Freezes how a checkpoint's images and text are prepared, so that the device needs no transformers.

Nothing is taken on trust: the frozen image processing and chat template are compared with transformers' own
on examples, and a checkpoint whose processing cannot be frozen is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimvlm.bundle import PromptTemplate, TextProcessing
from trimvlm.errors import UserError
from trimvlm.image_processing import ImageProcessing, SingleView
from trimvlm.images import make_preprocessor
from trimvlm.text import Turn, encode, load_tokenizer, render
from trimvlm_export.chat_template import freeze_template, not_frozen, render_by_template

TOKENIZER = "tokenizer.json"

# Sizes (width, height) that tell resize rules, crops and paddings apart.
SIZES = ((64, 64), (97, 53), (41, 160), (1, 7), (700, 351))

# What templates are known to alter: spaces at the ends, markup, braces, line ends.
TEXTS = ("What is it?", "  a <b> & 'c' {{ d }}\n\nline ", "Wie groß\u200b ist 猫?")


def image_processing(checkpoint: Path | str) -> ImageProcessing:
    """The checkpoint's image processing.

    Raises:
        UserError: no image processor in the checkpoint, a step that trimvlm does not know (padding, tiles),
            or a size that the vision tower does not take.
    """
    processor = _load("AutoImageProcessor", checkpoint, backend="pil")
    kind = type(processor).__name__
    if getattr(processor, "do_pad", None):
        raise UserError(
            f"{checkpoint}: image processor {kind}: do_pad is not supported, only resize and crop"
        )
    size, crop = processor.size, processor.crop_size if processor.do_center_crop else None
    frozen = SingleView(
        resize=_resize(checkpoint, size) if processor.do_resize else None,
        resample=int(processor.resample),
        crop=(crop["height"], crop["width"]) if crop else None,
        rescale=processor.rescale_factor if processor.do_rescale else 1.0,
        mean=_triple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
        std=_triple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
    )
    image_size = frozen.crop or frozen.resize
    if not isinstance(image_size, tuple):
        raise UserError(
            f"{checkpoint}: image processor {kind}: images of several sizes come out; it needs a centre crop "
            "or an exact size"
        )
    tower = _load("AutoConfig", checkpoint).vision_config.image_size
    if image_size != (tower, tower):
        raise UserError(
            f"{checkpoint}: image processor {kind} makes {image_size[0]} x {image_size[1]} pixels, but the "
            f"vision tower takes {tower} x {tower}; correct the one or the other"
        )
    _prove_images(checkpoint, processor, frozen)
    return frozen


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
    processor = _load("AutoProcessor", checkpoint)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    token = getattr(processor, "image_token", None)
    wanted = _load("AutoConfig", checkpoint).image_token_id
    if token is None or tokenizer.encode(token, add_special_tokens=False).ids != [wanted]:
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
    _prove_text(checkpoint, processor, template)
    return TextProcessing(
        tokenizer=TOKENIZER,
        image_token=token,
        image_token_id=wanted,
        eos_ids=_eos_ids(checkpoint),
        template=template,
    )


def _prove_text(checkpoint: Path, processor: Any, template: PromptTemplate) -> None:
    """Compares renderings and ids with transformers for 0 to 3 images, one to three turns."""
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    bos = processor.tokenizer.bos_token
    for text in TEXTS:
        for images in range(4):
            last = Turn(text=text, images=images)
            before = Turn(text=text, images=images, answer=text)
            for turns in ([last], [before, Turn(text=TEXTS[0])], [before, before, last]):
                theirs = render_by_template(processor, turns, True)
                ours = render(template, turns)
                if ours != theirs:
                    raise not_frozen(str(checkpoint), text)
                special = not (bos and theirs.startswith(bos))
                if (
                    encode(tokenizer, ours)
                    != processor.tokenizer(theirs, add_special_tokens=special).input_ids
                ):
                    raise UserError(
                        f"{checkpoint}: {TOKENIZER} does not tokenize {ours!r} as transformers does; write "
                        "it anew: AutoTokenizer.from_pretrained(directory).save_pretrained(directory)"
                    )


def _prove_images(checkpoint: Path | str, processor: Any, frozen: ImageProcessing) -> None:
    """Compares pixels with transformers: within one of 255 levels, for what rounding may do."""
    preprocess = make_preprocessor(frozen)
    level = frozen.rescale / np.array(frozen.std)[:, None, None]
    random = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))
        theirs = np.asarray(processor(images=image)["pixel_values"])
        ours = preprocess(image)
        if ours.shape != theirs.shape or np.any(np.abs(ours - theirs) > 1.01 * level):
            raise UserError(
                f"{checkpoint}: image processor {type(processor).__name__} does more than resize, crop, "
                f"rescale and normalise (see {width} x {height}); trimvlm cannot prepare its images"
            )


def _resize(checkpoint: Path | str, size: Any) -> int | tuple[int, int]:
    if size.get("shortest_edge") and not size.get("longest_edge"):
        return size["shortest_edge"]
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    raise UserError(
        f"{checkpoint}: image processor size {dict(size)} is not supported, only shortest_edge, or height "
        "and width"
    )


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = values if isinstance(values, list | tuple) else (values,) * 3
    return float(red), float(green), float(blue)


def _eos_ids(checkpoint: Path) -> tuple[int, ...]:
    """End-of-sequence ids that `generate` would use: of generation_config.json, else of the text model."""
    if (checkpoint / "generation_config.json").is_file():
        ids = _load("GenerationConfig", checkpoint).eos_token_id
    else:
        ids = _load("AutoConfig", checkpoint).text_config.eos_token_id
    if ids is None:
        raise UserError(f"{checkpoint}: no eos_token_id in generation_config.json; answers would never end")
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _load(kind: str, checkpoint: Path | str, **options: Any) -> Any:
    """`kind`.from_pretrained(checkpoint), local files only."""
    import transformers

    load: Callable[..., Any] = getattr(transformers, kind).from_pretrained
    try:
        return load(str(checkpoint), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint}: transformers cannot load its {kind} ({reason})") from None
