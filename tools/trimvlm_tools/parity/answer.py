"""One question's answer, as one implementation computed it.

Shapes: V vocabulary, G key/value heads, P rows, C head size, K rows kept, T text rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was computed on the way. Rows are numbered as the visual rows that enter the decoder.

    Attributes:
        visual: projector outputs [N, D].
        patches: per image the patches that the encoder stage chose; empty without a stage.
        patches_tie: noise of rounding's size makes the stage choose other patches.
        selected: per selection the surviving visual rows, ascending.
        scores: per selection the score of each row that entered.
        skipped: per skip stage the rows in skip mode, ascending.
        skip_scores: per skip stage the accumulator of each live row.
        visible: bool [K+T] of the selections whose threshold hides cached rows, by their number.
        logits: float32 [steps, V]: last prompt row, then after each teacher-forced token.
        kv: per layer with a cache, keys and values [1, G, P, C] after the prefill.
        tokens: greedy ids.
    """

    visual: NDArray
    patches: list[NDArray] = field(default_factory=list)
    patches_tie: bool = False
    selected: list[NDArray] = field(default_factory=list)
    scores: list[NDArray] = field(default_factory=list)
    skipped: list[NDArray] = field(default_factory=list)
    skip_scores: list[NDArray] = field(default_factory=list)
    visible: dict[int, NDArray] = field(default_factory=dict)
    logits: NDArray
    kv: list[tuple[NDArray, NDArray]] = field(default_factory=list)
    tokens: list[int]
