"""One layer's attention in the exported decoder: which row sees which key, and what comes out.

Shapes: R rows in the stream, Q of them query rows, P past rows, S = P + R keys, H heads, G key/value heads,
C head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimvlm.profile import Rows, TextKeys
from trimvlm.schedule import Row
from trimvlm_export.decoder_stream import EveryRow, Part, Stream, TextRows
from trimvlm_export.operators import attention, attention_weights, repeat_heads


@dataclass(frozen=True, kw_only=True)
class Attended:
    """What one layer's attention is computed from.

    Attributes:
        row: the layer's row of the Schedule.
        stream: rows whose keys these are, after the past.
        part: query rows.
        queries: [1, H, Q, C], rotated.
        keys, values: [1, G, S, C], keys rotated; past rows first.
        past: P.
        past_visible: bool [P], past rows that no threshold hides; None: all of them.
    """

    row: Row
    stream: Stream
    part: Part
    queries: Tensor
    keys: Tensor
    values: Tensor
    past: int
    past_visible: Tensor | None

    def visible(self, part: Part, text_keys: TextKeys = "live", visual_keys: Rows = "live") -> Tensor:
        """bool [part, S], made once per set of rows, past length and kind of hiding."""
        stream = self.stream
        memo = (self.row.cached, part.name, text_keys == "live", visual_keys == "live")
        found = stream.memo.get(memo)
        if found is None:
            visible = part.take(stream.causal)
            if (text_keys, visual_keys) != ("live", "live"):
                is_visual = visual_rows(stream)
                query = part.take(is_visual.unsqueeze(1))
                if text_keys != "live":
                    visible = visible & (query | ~is_visual.unsqueeze(0))
                if visual_keys != "live":
                    visible = visible & (~query | ~is_visual.unsqueeze(0))
            found = torch.cat((torch.ones(visible.shape[0], self.past, dtype=torch.bool), visible), dim=1)
            shown = self.shown()
            if shown is not None:
                found = found & shown.unsqueeze(0)
            stream.memo[memo] = found
        return found

    def shown(self) -> Tensor | None:
        """bool [S]: keys that no threshold hides; None: all of them."""
        return shown_keys(self.stream, self.past, self.past_visible)

    def shown_later(self) -> Tensor | None:
        """bool: which of the rows that are past from now on no threshold hides; None: there is none."""
        if not self.row.cached or self.row.masked_by is None or self.stream.shown is None:
            return None
        before = shown_past(self.stream, self.past, self.past_visible)
        return torch.cat((before, self.stream.shown[self.stream.fill :]))

    def weights(self) -> Tensor:
        """float32 [1, H, Q, S]: what the softmax gives, before `post_softmax` takes weights away."""
        return attention_weights(self.queries, self.keys, self.visible(self.part))

    def mixed(self, weights: Tensor) -> Tensor:
        """[1, H, Q, C]: values mixed by float32 weights [1, H, Q, S]."""
        return weights.to(self.values.dtype) @ repeat_heads(self.values, self.queries.shape[1])

    def output(self, mask: Literal["additive", "post_softmax"]) -> Tensor:
        """[1, H, Q, C]; zeros for rows that see no key."""
        row = self.row
        visible = self.visible(self.part, row.text_keys, row.visual_keys)
        if mask == "post_softmax" and (row.text_keys, row.visual_keys) != ("live", "live"):
            if isinstance(self.part, EveryRow) and row.visual_keys == "live" and self.shown() is None:
                return torch.cat((self._of_visual_rows(), self._of_text_rows().output(mask)), dim=2)
            weights = self.weights()
            left = weights * visible  # zeros also where no key was visible to begin with
            return self.mixed(left + self._to_sink(weights) if row.text_keys == "sink" else left)
        out = attention(self.queries, self.keys, self.values, visible)
        if row.query == "none" or (row.visual_keys == "live" and row.masked_by is None):
            return out  # every row sees itself
        sees = visible.float().sum(dim=1) > 0
        return torch.where(sees.unsqueeze(1), out, torch.zeros((), dtype=out.dtype))

    def _of_visual_rows(self) -> Tensor:
        """[1, H, visual, C]: rows that lose no key. One more is computed: no kernel takes none, at decode."""
        rows = self.stream.visual + 1
        visible = self.visible(self.part)[:rows]
        return attention(self.queries[:, :, :rows], self.keys, self.values, visible)[:, :, : rows - 1]

    def _of_text_rows(self) -> Attended:
        """The same layer for text rows alone: few rows whose weights are made in the open."""
        visual = self.stream.visual
        return replace(self, part=TextRows(visual), queries=self.queries[:, :, visual:])

    def _to_sink(self, weights: Tensor) -> Tensor:
        """What text rows' hidden visual keys lose, as weights for the first live visual row (VisiPruner)."""
        is_visual = visual_rows(self.stream)
        key = torch.cat((torch.zeros(self.past, dtype=torch.bool), is_visual))
        hidden = key.unsqueeze(0) & ~self.part.take(is_visual.unsqueeze(1))
        # At decode there is no visual key, so nothing to move.
        first = torch.arange(key.shape[0]) == self.past + self.stream.fill
        return (weights * hidden).sum(dim=3, keepdim=True) * first


def to_cache(attended: Attended, past: Tensor, new: Tensor) -> Tensor | None:
    """What a layer caches of its past [1, G, P, C] and new rows [1, G, R, C]; None: all of them."""
    row, stream = attended.row, attended.stream
    if row.live and not row.cached:
        return torch.cat((past, new[:, :, stream.visual :]), dim=2)
    return torch.cat((past, new[:, :, stream.fill :]), dim=2) if stream.fill else None


def visual_rows(stream: Stream) -> Tensor:
    """bool [R]."""
    return torch.arange(stream.hidden.shape[0]) < stream.visual


def shown_keys(stream: Stream, past: int, past_visible: Tensor | None) -> Tensor | None:
    """bool [P + R]: keys that no threshold hides; None: all of them."""
    if stream.shown is None and not stream.filled:
        return None
    rows = torch.ones_like(stream.positions, dtype=torch.bool) if stream.shown is None else stream.shown
    return torch.cat((shown_past(stream, past, past_visible), rows))


def shown_past(stream: Stream, past: int, past_visible: Tensor | None) -> Tensor:
    """bool [P]: the same of the past alone."""
    if past_visible is not None:
        return past_visible
    return torch.arange(past) >= stream.filled if stream.filled else torch.ones(past, dtype=torch.bool)
