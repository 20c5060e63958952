"""The exported decoder's residual stream, and the parts of it that run a sub-layer.

Shapes: R rows in the stream, visual ones first, D width, K kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from trimvlm.profile import ActiveRows


class Part(Protocol):
    """Some rows of the stream: those that run a sub-layer."""

    @property
    def name(self) -> str:
        """Tells parts of the same stream apart."""
        ...

    def take(self, x: Tensor) -> Tensor:
        """The part's rows of x [R, ...]."""
        ...

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [R, ...] with the part's rows replaced."""
        ...


@dataclass(frozen=True)
class EveryRow:
    """The whole stream."""

    name: str = "every"

    def take(self, x: Tensor) -> Tensor:
        return x

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows


@dataclass(frozen=True)
class TextRows:
    """The rows after `visual`: a slice."""

    visual: int
    name: str = "text"

    def take(self, x: Tensor) -> Tensor:
        return x[self.visual :]

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat((x[: self.visual], rows))


@dataclass(frozen=True)
class GatheredRows:
    """The rows numbered in `rows` int64, ascending."""

    rows: Tensor
    name: str

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.rows)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_put((self.rows,), rows)


@dataclass(frozen=True)
class LastRow:
    """The last text row alone. Gathered, so that builders know its length."""

    name: str = "last"

    def take(self, x: Tensor) -> Tensor:
        return x[-1].unsqueeze(0)

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        last = torch.arange(x.shape[0]).unsqueeze(1) == x.shape[0] - 1
        return torch.where(last, rows, x)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The residual stream and what describes its rows.

    In a filled decoder (`trimvlm.filling`) every past begins with a filler row, and so do the visual rows.

    Attributes:
        hidden: [R, D].
        visual: how many of the R rows are visual (they come first).
        positions: int64 [R], in the full unpruned sequence.
        coordinates: int64 [3, R], what M-RoPE rotates by; None: it is the positions.
        index: int64 [visual], which rows of the graph's `visual` input are alive, ascending.
        causal: bool [R, R], row i may see row j.
        shown: bool [R], keys that no threshold hides; None: all of them.
        unskipped: the rows that are not in skip mode; None: all of them.
        filled: 1 in a filled decoder, else 0: filler rows in a past.
        fill: filler rows in this stream; 1 in a filled decoder where visual rows are, else 0.
        memo: what was already made for these rows (rotary tables, masks), shared by all their layers.
    """

    hidden: Tensor
    visual: int
    positions: Tensor
    coordinates: Tensor | None
    index: Tensor
    causal: Tensor
    shown: Tensor | None = None
    unskipped: GatheredRows | None = None
    filled: int = 0
    fill: int = 0
    memo: dict[Any, Any]

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        positions: Tensor,
        index: Tensor,
        *,
        coordinates: Tensor | None = None,
        shown: Tensor | None = None,
        filled: int = 0,
        fill: int = 0,
    ) -> Stream:
        """A stream of new rows, none of them in skip mode."""
        if fill and shown is None:
            shown = torch.arange(hidden.shape[0]) >= fill
        return cls(
            hidden=hidden,
            visual=index.shape[0],
            positions=positions,
            coordinates=coordinates,
            index=index,
            causal=positions.unsqueeze(1) >= positions.unsqueeze(0),
            shown=shown,
            filled=filled,
            fill=fill,
            memo={},
        )

    def keep(self, kept_K: Tensor) -> tuple[Stream, Tensor]:
        """Drops visual rows. Returns the stream and the row numbers [R'] that remain of the old one."""
        text = torch.arange(self.visual, self.hidden.shape[0])
        rows = torch.cat((kept_K, text))
        hidden, positions = self.hidden.index_select(0, rows), self.positions.index_select(0, rows)
        coordinates = None if self.coordinates is None else self.coordinates.index_select(1, rows)
        shown = None if self.shown is None else self.shown.index_select(0, rows)
        index = self.index.index_select(0, kept_K)
        kept = Stream.of(
            hidden,
            positions,
            index,
            coordinates=coordinates,
            shown=shown,
            filled=self.filled,
            fill=self.fill,
        )
        return kept, rows

    def show_only(self, shown_visual: Tensor) -> Stream:
        """Hides the visual rows that are False in bool [visual]."""
        text = torch.ones_like(self.positions[self.visual :], dtype=torch.bool)
        if self.fill:
            shown_visual = shown_visual & self.of_prompt
        return replace(self, shown=torch.cat((shown_visual, text)))

    @property
    def of_prompt(self) -> Tensor:
        """bool [visual]: visual rows but the filler row."""
        return torch.arange(self.visual) >= self.fill

    def part(self, rows: ActiveRows) -> Part:
        """The rows that run a sub-layer: visual ones by the layer's rule, and all text rows."""
        if rows == "none":
            return TextRows(self.visual)
        if rows == "unskipped":
            assert self.unskipped is not None
            return self.unskipped
        return EveryRow()

    def add(self, part: Part, delta: Tensor) -> Stream:
        """Adds a sub-layer's output to the rows that computed it."""
        return replace(self, hidden=part.put(self.hidden, part.take(self.hidden) + delta))
