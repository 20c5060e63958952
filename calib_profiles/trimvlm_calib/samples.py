"""Calibration samples: a folder of the user's own images with questions about them.

    DIR/questions.jsonl     one JSON object a line: {"image": "a.png", "question": "what is it ?"}
    DIR/a.png ...           images, by the names that the lines give

`answer` is optional (calibrators compare the model with itself), and other keys are ignored.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm.value import Value

QUESTIONS = "questions.jsonl"


class Sample(Value, frozen=True, kw_only=True):
    """A question about an image file, and its answer where known."""

    image: Path
    question: str
    answer: str | None = None


def load_samples(directory: Path | str) -> list[Sample]:
    """Reads a folder of samples.

    Raises:
        UserError: no such folder, or a line that is no sample; the message names the line and the key.
    """
    directory = Path(directory)
    file = directory / QUESTIONS
    if not file.is_file():
        raise UserError(
            f"{directory}: no {QUESTIONS} here; write one line per sample, "
            '{"image": "a.png", "question": "what is it ?"}, beside the images'
        )
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    samples = [
        _sample(line, directory, f"{file}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise UserError(f"{file}: holds no samples")
    return samples


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` different samples in an order that `seed` decides.

    Raises:
        UserError: fewer samples than asked for.
    """
    if not 1 <= count <= len(samples):
        raise UserError(f"{count} samples asked for, there are {len(samples)}; ask for 1 to {len(samples)}")
    return random.Random(seed).sample(list(samples), count)


def model_inputs(sample: Sample, processor: Any) -> dict[str, Any]:
    """What the model is given: the question in the checkpoint's chat template, and the image.

    Raises:
        UserError: an image that cannot be read, or a checkpoint without a chat template.
    """
    from PIL import Image, UnidentifiedImageError

    if not getattr(processor, "chat_template", None):
        raise UserError("the checkpoint has no chat template; add chat_template.jinja to its directory")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    try:
        with Image.open(sample.image) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{sample.image}: not a readable image: {error}") from None
    return dict(processor(images=image, text=prompt, return_tensors="pt"))


def _sample(line: str, directory: Path, where: str) -> Sample:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {line.strip()[:40]!r} is not a JSON object")
    for key in ("image", "question"):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{where}: {key}: a text is needed, found {entry.get(key)!r}")
    answer = entry.get("answer")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"{where}: answer: a text is needed, found {answer!r}")
    image = directory / entry["image"]
    if not image.is_file():
        raise UserError(f"{where}: image: there is no file {image}")
    return Sample(image=image, question=entry["question"], answer=answer)
