"""What a bundle answers and how long it takes, through the Session that a device runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np

from trimvlm.bundle import Bundle
from trimvlm.opening import ORT_CPU
from trimvlm.profile import layer_numbers
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm.value import Value
from trimvlm_calib.samples import Sample

WARM_UP = 3


class Measured(Value, frozen=True, kw_only=True):
    """Accuracy over all questions; medians of the times of one question, in seconds.

    Attributes:
        exact_match: share of answers that equal the expected text.
        right: the same question by question.
        text_rows: median number of text rows of a prompt.
        tokens_per_second: decode only, over all questions; None if every answer was one token.
    """

    exact_match: float
    right: tuple[bool, ...]
    text_rows: int
    preprocess: float
    vision: float
    select: float | None
    prefill: float
    first_token: float
    tokens_per_second: float | None


def measure(bundle: Bundle, profile: str, questions: Sequence[Sample], target: str = ORT_CPU) -> Measured:
    """Asks all questions, after a warm-up."""
    right: list[bool] = []
    timings, text_rows = [], []
    with Session.open(bundle, profile, target) as session:
        for number, question in enumerate([*questions[:WARM_UP], *questions]):
            answer = "".join(session.generate(question.question, [question.image], max_new_tokens=16))
            if number < WARM_UP:
                continue
            right.append(answer.strip() == question.answer)
            timings.append(session.timings)
            text_rows.append(len(session.prompt(question.question, 1).input_ids))
    tokens = sum(timing.decode_tokens for timing in timings)
    selects = [timing.select for timing in timings if timing.select is not None]
    return Measured(
        exact_match=sum(right) / len(right),
        right=tuple(right),
        text_rows=round(median(text_rows)),
        preprocess=median(timing.preprocess or 0.0 for timing in timings),
        vision=median(timing.vision or 0.0 for timing in timings),
        select=median(selects) if selects else None,
        prefill=median(timing.prefill or 0.0 for timing in timings),
        first_token=median(timing.first_token for timing in timings),
        tokens_per_second=tokens / sum(timing.decode for timing in timings) if tokens else None,
    )


def survivors(
    bundle: Bundle, profile: str, schedule: Schedule, question: Sample
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Which patches are alive where, for one question: (layers, patches) for each run of equal layers."""
    with Session.open(bundle, profile) as session:
        rows = session.prompt(question.question, 1)
        seen = session.visual([question.image])
        outputs = session.prefill(rows, seen.rows, patches=seen.chosen)
    patches = seen.chosen[0] if seen.chosen else np.arange(schedule.visual_tokens)
    found: list[tuple[list[int], tuple[int, ...]]] = []
    alive: tuple[int, ...] = ()
    stage = 0
    for row in schedule.rows:
        if row.layer == schedule.inject:
            alive = tuple(patches.tolist())
        if row.select:
            alive = tuple(patches[outputs[f"selected.{stage}"]].tolist())
            stage += 1
        if row.layer == schedule.exit:
            alive = ()
        if found and found[-1][1] == alive:
            found[-1][0].append(row.layer)
        else:
            found.append(([row.layer], alive))
    return tuple((f"layers {layer_numbers(layers)}", rows_alive) for layers, rows_alive in found)
