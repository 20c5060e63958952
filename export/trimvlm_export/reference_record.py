"""What the reference records of a prefill.

Shapes as in `reference.py`: S all rows of the prompt, T text rows, K rows kept, D width, H heads, G key/value
heads, C head size, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Prefill:
    """What one prefill computed. Arrays are float32 unless said otherwise.

    Attributes:
        logits: [V], of the last row.
        selected: per selection, int64 [K]: visual rows that survive, ascending.
        scores: per selection, the score of each visual row that entered, in ascending row order.
        skipped: per skip stage, int64: visual rows in skip mode from there on, ascending.
        skip_scores: per skip stage, the accumulator of each live visual row, in ascending row order.
        visible: bool [K+T] for each selection in `Schedule.masks`: cached rows, ordered as in `kv`, that its
            threshold leaves visible.
        live: per layer, bool [S]: rows whose keys the layer computes.
        last_row: per layer [H, S]: attention weights of the last row; zero where it does not look.
        hidden: L+1 entries [S, D]: the input of each layer (after injection), and the last layer's output.
            Rows that are not live hold values that nobody sees.
        kv: per layer (keys, values), each [1, G, K+T, C], as the graph's `present_*`: cached visual rows
            first, then text rows; None where the layer has none.
    """

    logits: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    selected: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    skipped: list[np.ndarray] = field(default_factory=list)
    skip_scores: list[np.ndarray] = field(default_factory=list)
    visible: dict[int, np.ndarray] = field(default_factory=dict)
    live: list[np.ndarray] = field(default_factory=list)
    last_row: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)
    kv: list[tuple[np.ndarray, np.ndarray] | None] = field(default_factory=list)
