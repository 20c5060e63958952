"""One layer's attention in the exported decoder: which row sees which key, and what comes out.

Shapes: R rows in the stream, Q of them query rows, P past rows, S = P + R keys, H heads, G key/value heads,
C head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimvlm.profile import Rows, TextKeys
from trimvlm.schedule import Row
from trimvlm_export.decoder_stream import LastRow, Part, Stream, TextRows
from trimvlm_export.operators import attention, attention_weights, repeat_heads

_NOTHING: tuple[TextKeys, Rows] = (
    "live",
    "live",
)  # what text rows lose, what visual rows lose


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
        """float32 [1, H, Q, S]: what the softmax gives, for a selection inside the layer."""
        return attention_weights(self.queries, self.keys, self.visible(self.part))

    def mixed(self, weights: Tensor) -> Tensor:
        """[1, H, Q, C]: values mixed by float32 weights [1, H, Q, S]."""
        return weights.to(self.values.dtype) @ repeat_heads(self.values, self.queries.shape[1])

    def output(self, mask: Literal["additive", "post_softmax"]) -> Tensor:
        """[1, H, Q, C]; zeros for rows that see no key."""
        row, lost = self.row, _NOTHING
        hidden: tuple[TextKeys, Rows] = row.text_keys, row.visual_keys
        if mask == "post_softmax":
            hidden, lost = lost, hidden
        visible = self.visible(self.part, *hidden)
        out = self._attention(visible, *lost)
        if row.query == "none" or (hidden[1] == "live" and row.masked_by is None):
            return out  # every row sees some key
        sees = visible.float().sum(dim=1) > 0
        return torch.where(sees.unsqueeze(1), out, torch.zeros((), dtype=out.dtype))

    def _attention(self, visible: Tensor, text_keys: TextKeys, visual_keys: Rows) -> Tensor:
        """[1, H, Q, C], where rows lose the weights of visual keys after the softmax.

        A weight that is lost, or that goes to another key, is one for another value: so no weight is made in
        the open, and kernels for attention serve these layers too.

        Args:
            visible: bool [Q, S].
            text_keys: what text rows lose.
            visual_keys: what visual rows lose.
        """
        if text_keys == visual_keys or isinstance(self.part, TextRows | LastRow):
            return attention(self.queries, self.keys, self._values(text_keys), visible)
        # How many queries are of visual rows, which come first. One more is computed: at decode is none,
        # and no kernel takes that.
        visual = self.queries.shape[2] - (self.stream.hidden.shape[0] - self.stream.visual)
        some = self.queries[:, :, : visual + 1], self.keys, self._values(visual_keys), visible[: visual + 1]
        # The keys that text rows see, as a tensor of its own: building two attentions that read one tensor of
        # keys crashes TensorRT-RTX 1.7.1.
        keys = torch.where(visible[-1].unsqueeze(1), self.keys, torch.zeros((), dtype=self.keys.dtype))
        rest = self.queries[:, :, visual:], keys, self._values(text_keys), visible[visual:]
        return torch.cat((attention(*some)[:, :, :visual], attention(*rest)), dim=2)

    def _values(self, visual_keys: TextKeys) -> Tensor:
        """[1, G, S, C]: the values for rows that lose visual keys' weights, or whose first visual key gets
        them all (`sink`, VisiPruner)."""
        if visual_keys == "live":
            return self.values
        past, fill = self.past, self.stream.fill
        key = torch.cat((torch.zeros(past, dtype=torch.bool), visual_rows(self.stream)))
        instead = torch.zeros((), dtype=self.values.dtype)
        if visual_keys == "sink":  # at decode there is no visual key, and this is a text row's
            instead = self.values[:, :, past + fill : past + fill + 1]
        return torch.where(key.unsqueeze(1), instead, self.values)


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
