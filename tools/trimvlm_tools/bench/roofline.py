"""What a decoder's runs have to do, from the Schedule alone, and the least time that the peaks allow.

Per layer the larger of FLOPs over the measured peak and bytes over the measured bandwidth of reading, or
their sum where neither hides the other; bytes are the layer's weights and its keys and values. The LM
head of the one row whose logits are wanted is a part of its own. An estimate for comparison, never a
measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import msgspec

from trimvlm.accounting import hidden_pairs, kv_bytes_per_layer, left_out, mac2, selection_flops
from trimvlm.profile import ModelSpec
from trimvlm.schedule import Row, Schedule
from trimvlm.value import Value
from trimvlm_tools.bench.peaks import Peaks


class Work(Value, frozen=True, kw_only=True):
    """Of each layer and, last, of the LM head: 2 FLOPs per multiply-accumulate; bytes of weights, keys and
    values."""

    flops: tuple[int, ...]
    bytes: tuple[float, ...]

    def seconds(self, peaks: Peaks) -> float:
        """The least time."""
        pairs = zip(self.flops, self.bytes, strict=True)
        return sum(max(flops / peaks.flops, moved / peaks.read) for flops, moved in pairs)

    def seconds_in_turn(self, peaks: Peaks) -> float:
        """The least time where nothing is read while something is multiplied."""
        return sum(self.flops) / peaks.flops + sum(self.bytes) / peaks.read


def prefill_work(schedule: Schedule, text: int, value_bytes: float) -> Work:
    """A prefill of one image and `text` text rows.

    Args:
        value_bytes: bytes of one value of a weight matrix: 4 in float32, less where weights are quantised.
    """
    model = schedule.model
    layers = [
        layers_flops + ranking - hidden
        for layers_flops, ranking, hidden in zip(
            _per_layer(mac2, schedule, text),
            _per_layer(selection_flops, schedule, text),
            hidden_pairs(schedule),
            strict=True,
        )
    ]
    layers[-1] -= left_out(schedule, text)
    cached = kv_bytes_per_layer(schedule, text, 4)
    weights = [value_bytes * layer_values(model, row) for row in schedule.rows]
    head = model.hidden * model.vocab
    return Work(
        flops=(*layers, 2 * head),
        bytes=(*(w + kv for w, kv in zip(weights, cached, strict=True)), value_bytes * head),
    )


def decode_work(schedule: Schedule, text: int, tokens: int, value_bytes: float) -> Work:
    """All of `tokens` decode steps after a prefill of one image and `text` text rows: every step reads all
    weights, and the keys and values that are there by then."""
    model = schedule.model
    rows = text + (tokens + 1) / 2  # of text at the mean step, its own included
    width, per_row = model.heads * model.head_dim, 8 * model.kv_heads * model.head_dim
    flops, moved = [], []
    for row in schedule.rows:
        values = layer_values(model, row)
        keys = (row.cached + rows) if row.attends else 0
        flops.append(round(tokens * (2 * values + 4 * width * keys)))
        moved.append(tokens * (value_bytes * values + per_row * keys))
    head = model.hidden * model.vocab
    return Work(flops=(*flops, tokens * 2 * head), bytes=(*moved, float(tokens * value_bytes * head)))


def weight_values(schedule: Schedule) -> int:
    """Values of all matrices that a decode step reads, the LM head's included."""
    model = schedule.model
    return sum(layer_values(model, row) for row in schedule.rows) + model.hidden * model.vocab


def layer_values(model: ModelSpec, row: Row) -> int:
    """Values of the weight matrices that one layer has under a Schedule."""
    if row.execute == "none":
        return 0
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = 2 * model.hidden * (width + kv_width) if row.attends else 0
    return attention + (3 * model.hidden * model.ffn if row.sublayers != "attention" else 0)


def _per_layer(cost: Callable[[Schedule, int], int], schedule: Schedule, text: int) -> list[int]:
    """A cost of whole schedules, layer by layer: what each layer adds to those before it."""
    upto = [
        cost(msgspec.structs.replace(schedule, rows=schedule.rows[:count]), text)
        for count in range(len(schedule.rows) + 1)
    ]
    return [after - before for before, after in pairwise(upto)]
