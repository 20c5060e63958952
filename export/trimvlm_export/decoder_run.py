"""What one run of the exported decoder is given, carries from layer to layer, and puts out.

Shapes: T text rows, P past rows, R rows in the stream, D width, G key/value heads, C head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimvlm.schedule import Row
from trimvlm_export.decoder_attention import Attended
from trimvlm_export.decoder_skip import Skipping


class Outputs(NamedTuple):
    """The graph's outputs in their order (`trimvlm.bundle`); lists are in layer or stage order."""

    logits: Tensor
    present_key: list[Tensor]
    present_value: list[Tensor]
    present_visible: list[Tensor]
    selected: list[Tensor]
    scores: list[Tensor]
    skipped: list[Tensor]
    skip_scores: list[Tensor]


@dataclass(kw_only=True)
class Run:
    """What one run was given, and what it has put out so far.

    Attributes:
        images: of the prompt; 0 at decode.
        raters: float32 [T], for `text_attention`; None where no stage ranks by it.
        before: the attention of the layer before.
    """

    images: int
    forced: Sequence[Tensor]
    forced_skip: Sequence[Tensor]
    router_scores: Tensor | None
    past: Iterator[tuple[Tensor, Tensor]]
    past_visible: dict[int, Tensor]
    raters: Tensor | None = None
    before: Attended | None = None
    skipping: Skipping | None = None
    out: Outputs = field(init=False)
    present_visible: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.out = Outputs(torch.empty(0), [], [], [], [], [], [], [])

    def visible_past(self, row: Row) -> Tensor | None:
        """bool [P]: past rows of a layer that its threshold leaves visible; None: all of them."""
        return None if row.masked_by is None or not row.cached else self.past_visible[row.masked_by]


class Made(NamedTuple):
    """What an own score has computed of its layer: input norm [R, D], rotated keys [1, G, R, C]."""

    normed: Tensor
    keys: Tensor | None

    def rows(self, rows: Tensor, *, same_positions: bool) -> Made:
        """Only these rows; without keys where they must be rotated anew."""
        assert self.keys is not None
        keys = self.keys.index_select(2, rows) if same_positions else None
        return Made(self.normed.index_select(0, rows), keys)
