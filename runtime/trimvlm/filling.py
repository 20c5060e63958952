"""Filled decoder graphs: for libraries that do not execute empty tensors.

The ordinary decoder graph is fed tensors of zero rows: no visual rows at decode, no past at prefill, no
forced indices. A filled one has a filler row instead, always, so that one graph serves all runs: row 0 of
everything that may be empty stands for nothing. No other row sees it, no selection counts it, and it is not
cached beyond row 0 of each past. It says what it is by the name of an input, `filled_positions` in place of
`visual_positions`.

Inputs and outputs of filled graphs, where they differ from `trimvlm.bundle` (N, P, K as there):

    visual [1 + N, D]                      zeros first
    filled_positions int64 [1 + N]         `NOWHERE` first
    visual_coordinates int64 [3, 1 + N]    zeros first
    router_scores float32 [1 + N]          zero first
    forced.{s}, forced_skip.{k}            int64 [1 or 1 + K], 0 first, then rows of `visual`, from 1 on;
                                           one row: free running
    past_key.{l}, past_value.{l}           float [1, G, 1 + P_g, C], zeros first; presents begin with the same
    past_visible.{s} bool [1 + P_g]        False first; presents begin with the same
    selected.{s}, skipped.{k}              int64 [1 + K], 0 first, then rows of `visual`
    scores.{s}, skip_scores.{k}            float32, one without meaning first
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILLED = "filled_positions"
POSITIONS = "visual_positions"
NOWHERE = 1 << 20  # position of the filler row, after every row of any prompt

# Axis that has the filler row, by the name without its number.
INPUTS = {
    **{"visual": 0, FILLED: 0, "visual_coordinates": 1, "router_scores": 0, "forced": 0, "forced_skip": 0},
    **{"past_key": 2, "past_value": 2, "past_visible": 0},
}
OUTPUTS = {
    **{"present_key": 2, "present_value": 2, "present_visible": 0},
    **{"selected": 0, "scores": 0, "skipped": 0, "skip_scores": 0},
}
NUMBERS = ("forced", "forced_skip", "selected", "skipped")  # of rows of `visual`


def is_filled(inputs: Mapping[str, Any]) -> bool:
    """Whether a decoder with these inputs is a filled one."""
    return FILLED in inputs


def filled_name(name: str) -> str:
    """An input's name in a filled decoder."""
    return FILLED if name == POSITIONS else name


def fill(feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of an ordinary decoder as those of a filled one; what is no array has its filler row already."""
    ports = {filled_name(name): value for name, value in feeds.items()}
    return {name: _filled(name.partition(".")[0], value) for name, value in ports.items()}


def strip(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a filled decoder as those of an ordinary one; what is no array is left as it is."""
    return {name: _stripped(name.partition(".")[0], value) for name, value in outputs.items()}


def _filled(kind: str, value: Any) -> Any:
    if kind not in INPUTS or not isinstance(value, np.ndarray):
        return value
    rows = value + 1 if kind in NUMBERS else value
    return np.insert(rows, 0, NOWHERE if kind == FILLED else 0, axis=INPUTS[kind])


def _stripped(kind: str, value: Any) -> Any:
    if kind not in OUTPUTS or not isinstance(value, np.ndarray):
        return value
    rows: NDArray[Any] = np.delete(value, 0, axis=OUTPUTS[kind])
    return rows - 1 if kind in NUMBERS else rows
