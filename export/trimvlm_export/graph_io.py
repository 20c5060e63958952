"""Names and shapes of the decoder graph's inputs and outputs, from the Schedule alone (`trimvlm.bundle`)."""

from __future__ import annotations

from typing import Any

import torch

from trimvlm.filling import FILLED, POSITIONS
from trimvlm.rules import RouterScores
from trimvlm.schedule import Row, Schedule

Dims = list[str | int]

IMAGES, TEXT = (
    2,
    9,
)  # sizes of the traced example: none of them 0 or 1, which a trace would take for constants


def attending(schedule: Schedule) -> list[Row]:
    """Layers with keys and values."""
    return [row for row in schedule.rows if row.attends]


def masked(schedule: Schedule) -> list[Row]:
    """For each of `Schedule.masks` one layer whose cached rows it hides; all of them cache equally many."""
    layers = {row.masked_by: row for row in schedule.rows if row.cached}
    return [layers[stage] for stage in schedule.masks]


def ranks_by_router(schedule: Schedule) -> bool:
    """Whether the graph takes a router's scores."""
    return any(row.select and isinstance(row.select.by, RouterScores) for row in schedule.rows)


def past_dim(schedule: Schedule, row: Row) -> str:
    """Symbolic size of a layer's past: one name per distinct number of cached visual rows."""
    return f"past_{schedule.kv_groups.index(row.cached)}"


def decoder_inputs(schedule: Schedule, filled: bool = False) -> dict[str, Dims]:
    """Input name to dimensions, in graph order; of a filled decoder those that have a filler row count
    it (`trimvlm.filling`)."""
    model = schedule.model
    inputs: dict[str, Dims] = {
        "input_ids": ["text"],
        "visual": ["visual", model.hidden],
        "text_positions": ["text"],
        FILLED if filled else POSITIONS: ["visual"],
    }
    if model.mrope:
        inputs |= {"text_coordinates": [3, "text"], "visual_coordinates": [3, "visual"]}
    if ranks_by_router(schedule):
        inputs["router_scores"] = ["visual"]
    inputs |= {f"forced.{stage}": [f"forced_{stage}"] for stage in range(len(schedule.stages))}
    inputs |= {f"forced_skip.{k}": [f"forced_skip_{k}"] for k in range(len(schedule.skip_stages))}
    for kind in ("key", "value"):
        for row in attending(schedule):
            dims: Dims = [1, model.kv_heads, past_dim(schedule, row), model.head_dim]
            inputs[f"past_{kind}.{row.layer}"] = dims
    inputs |= {f"past_visible.{row.masked_by}": [past_dim(schedule, row)] for row in masked(schedule)}
    return inputs


def decoder_outputs(schedule: Schedule) -> dict[str, Dims]:
    """Output name to dimensions, in graph order."""
    model = schedule.model
    outputs: dict[str, Dims] = {"logits": [1, model.vocab]}
    for kind in ("key", "value"):
        for row in attending(schedule):
            total = past_dim(schedule, row).replace("past", "total")
            outputs[f"present_{kind}.{row.layer}"] = [1, model.kv_heads, total, model.head_dim]
    for row in masked(schedule):
        outputs[f"present_visible.{row.masked_by}"] = [past_dim(schedule, row).replace("past", "total")]
    outputs |= {f"selected.{stage}": [f"selected_{stage}"] for stage in range(len(schedule.stages))}
    outputs |= {f"scores.{stage}": [f"entered_{stage}"] for stage in range(len(schedule.stages))}
    outputs |= {f"skipped.{k}": [f"skipped_{k}"] for k in range(len(schedule.skip_stages))}
    outputs |= {f"skip_scores.{k}": [f"reached_{k}"] for k in range(len(schedule.skip_stages))}
    return outputs


def decoder_example(schedule: Schedule, *, dtype: torch.dtype, filled: bool = False) -> dict[str, Any]:
    """Arguments of `Decoder.forward` for tracing: two images, a past, every varying size distinct."""
    model, rows = schedule.model, attending(schedule)
    visual, start, fill = IMAGES * schedule.visual_tokens + filled, 3, int(filled)

    def past_rows(row: Row) -> int:
        return 5 + IMAGES * row.cached + fill

    def past() -> list[torch.Tensor]:
        return [torch.zeros(1, model.kv_heads, past_rows(row), model.head_dim, dtype=dtype) for row in rows]

    mrope = {}
    if model.mrope:
        mrope = {
            "text_coordinates": torch.zeros(3, TEXT, dtype=torch.long),
            "visual_coordinates": torch.zeros(3, visual, dtype=torch.long),
        }
    router = {"router_scores": torch.arange(float(visual))} if ranks_by_router(schedule) else {}
    return {
        "input_ids": torch.zeros(TEXT, dtype=torch.long),
        "visual": torch.zeros(visual, model.hidden, dtype=dtype),
        "text_positions": torch.cat((torch.arange(start), torch.arange(start + visual, TEXT + visual))),
        "visual_positions": torch.arange(start, start + visual),
        **mrope,
        **router,
        "forced": [torch.arange(IMAGES * row.after + fill) for row in schedule.stages],
        "forced_skip": [torch.arange(IMAGES * row.skipped + fill) for row in schedule.skip_stages],
        "past_key": past(),
        "past_value": past(),
        "past_visible": [torch.ones(past_rows(row), dtype=torch.bool) for row in masked(schedule)],
    }


def is_dynamic(name: str, dimension: int) -> bool:
    """Which dimensions of the example vary."""
    return dimension == {"past_key": 2, "past_value": 2, "text_coordinates": 1, "visual_coordinates": 1}.get(
        name, 0
    )
