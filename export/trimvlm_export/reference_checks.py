"""What the reference refuses, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np

from trimvlm.encoder_rules import EncoderStage
from trimvlm.errors import UserError
from trimvlm.rules import RouterScores, reads
from trimvlm.schedule import Row, Schedule


def check_model(schedule: Schedule, config: Any, encoder: EncoderStage | None) -> None:
    """Refuses a Schedule of another geometry than `config`, the text model's, or of another budget.

    Raises:
        UserError: naming both values.
    """
    for name, found in (("layers", config.num_hidden_layers), ("hidden", config.hidden_size)):
        if (wanted := getattr(schedule.model, name)) != found:
            raise UserError(f"the schedule is for a model with {name} {wanted}, but this one has {found}")
    if encoder is not None and encoder.keep != schedule.visual_tokens:
        raise UserError(
            f"encoder.keep: {encoder.keep} rows, but the schedule is for {schedule.visual_tokens} per image; "
            "resolve the schedule with this encoder stage"
        )


def check_router(schedule: Schedule, router_scores: np.ndarray | None, visual: int) -> None:
    """Refuses to select by scores that are not there, for `visual` rows.

    Raises:
        UserError: naming what was found and what is wanted.
    """
    wanted = any(isinstance(row.select.by, RouterScores) for row in schedule.stages if row.select)
    found = None if router_scores is None else np.shape(router_scores)
    if wanted and visual and found != (visual,):
        raise UserError(
            f"router_scores: {'missing' if found is None else f'shape {found}'}; the schedule selects by "
            f"router, give one score for each of the {visual} visual rows"
        )


def check_resume(schedule: Schedule, first: int) -> None:
    """Refuses to start at layer `first` with the input that it has in the dense model.

    Raises:
        UserError: the Schedule does something before that layer, or ranks by the layer before it.
    """
    tokens = schedule.visual_tokens
    if not 0 <= first < len(schedule.rows):
        raise UserError(f"resume: layer {first} is not within 0..{len(schedule.rows) - 1}")
    for row in schedule.rows[:first]:
        if row != Row(layer=row.layer, live=tokens, after=tokens):
            raise UserError(
                f"resume: layer {row.layer} is not as in the dense model; resume at or before layer "
                f"{row.layer}"
            )
    select = schedule.rows[first].select
    if first and select and reads(select.by) == "previous":
        raise UserError(
            f"resume: layer {first} selects by the attention of layer {first - 1}; resume at or before layer "
            f"{first - 1}"
        )
