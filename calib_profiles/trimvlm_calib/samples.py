"""Calibration samples: the user's own images with questions about them, as lines of JSON.

    DIR/questions.jsonl     one JSON object a line: {"image": "a.png", "question": "what is it ?"}
    DIR/a.png ...           images, by paths relative to the JSONL file (or absolute)

Any other `.jsonl` file is read the same way. `prompt` may stand for `question`. `answer` is optional
(calibrators compare the model with itself), `task` too (names a subset to calibrate on); other keys are
ignored.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm.images import read_rgb
from trimvlm.value import Value

if TYPE_CHECKING:
    from trimvlm_export.loading import Preparation

QUESTIONS = "questions.jsonl"
RECENT = 64  # samples whose prepared inputs are kept: all of them, for the papers' numbers of samples


class Sample(Value, frozen=True, kw_only=True):
    """A question about an image file, its answer where known, and the task that it belongs to."""

    image: Path
    question: str
    answer: str | None = None
    task: str | None = None


def load_samples(place: Path | str) -> list[Sample]:
    """Reads a folder with `questions.jsonl`, or a JSONL file.

    Raises:
        UserError: nothing there, or a line that is no sample; the message names the line and the key.
    """
    place = Path(place)
    file = place if place.suffix == ".jsonl" else place / QUESTIONS
    if not file.is_file():
        what = f"no {QUESTIONS} here" if file != place else "no such file"
        raise UserError(
            f'{place}: {what}; write one line per sample, {{"image": "a.png", "question": "what is it ?"}}, '
            "beside the images"
        )
    try:
        lines = file.read_text("utf-8").split("\n")  # splitlines would also split at U+2028 within a text
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from None
    samples = [
        _sample(line, file.parent, f"{file}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not samples:
        raise UserError(f"{file}: holds no samples")
    return samples


def set_name(place: Path | str) -> str:
    """What a Profile calls the set at `place`: the folder's name, or the JSONL file's."""
    place = Path(place).resolve()
    return place.parent.name if place.name == QUESTIONS else place.name


def of_task(samples: Sequence[Sample], task: str) -> list[Sample]:
    """The samples of one task.

    Raises:
        UserError: there are none; the message gives the tasks that there are.
    """
    chosen = [sample for sample in samples if sample.task == task]
    if not chosen:
        known = Counter(sample.task for sample in samples if sample.task)
        there = ", ".join(f"{name} ({count})" for name, count in sorted(known.items())) or "none are named"
        raise UserError(f"task {task!r}: no sample has it; tasks of these samples: {there}")
    return chosen


def draw(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` different samples in an order that `seed` decides.

    Raises:
        UserError: fewer samples than asked for.
    """
    if not 1 <= count <= len(samples):
        raise UserError(f"{count} samples asked for, there are {len(samples)}; ask for 1 to {len(samples)}")
    return random.Random(seed).sample(list(samples), count)


def digest(samples: Sequence[Sample]) -> str:
    """SHA-256 over the questions and the bytes of the images, in order."""
    total = hashlib.sha256()
    for sample in samples:
        for part in (sample.question.encode(), sample.image.read_bytes()):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


class PreparedSamples(Sequence[dict[str, Any]]):
    """What the model is given for each sample, prepared when asked for: pixels of a large set need not fit.

    Raises (on construction):
        UserError: an image that cannot be read, or a checkpoint without a chat template.
    """

    def __init__(self, samples: Sequence[Sample], prepare: Preparation) -> None:
        _check_template(prepare.processor)
        for sample in samples:
            read_rgb(sample.image)  # before the work, not in the middle of it
        self._samples = samples
        self._prepared = lru_cache(RECENT)(lambda number: model_inputs(samples[number], prepare))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self._prepared(range(len(self))[number])


def model_inputs(sample: Sample, prepare: Preparation) -> dict[str, Any]:
    """What the model is given: the question in the checkpoint's chat template, and the image.

    Raises:
        UserError: an image that cannot be read, or a checkpoint without a chat template.
    """
    _check_template(prepare.processor)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
    prompt = prepare.processor.apply_chat_template([message], add_generation_prompt=True)
    return prepare([sample.image], prompt)


def _check_template(processor: Any) -> None:
    if not getattr(processor, "chat_template", None):
        raise UserError("the checkpoint has no chat template; add chat_template.jinja to its directory")


def _sample(line: str, directory: Path, where: str) -> Sample:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {line.strip()[:40]!r} is not a JSON object")
    asked = "prompt" if "prompt" in entry else "question"
    if "prompt" in entry and "question" in entry:
        raise UserError(f"{where}: prompt and question say the same thing; give one of them")
    for key in ("image", asked):
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{where}: {key}: a text is needed, found {entry.get(key)!r}")
    for key in ("answer", "task"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise UserError(f"{where}: {key}: a text is needed, found {entry[key]!r}")
    image = directory / entry["image"]
    if not image.is_file():
        raise UserError(f"{where}: image: there is no file {image}")
    return Sample(image=image, question=entry[asked], answer=entry.get("answer"), task=entry.get("task"))
