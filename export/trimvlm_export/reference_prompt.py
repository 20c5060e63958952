"""One prompt's way through the reference: what happens at a decoder layer's hooks.

Shapes as in `reference.py`: S all rows of the prompt, T text rows, K rows kept, D width, H heads, G key/value
heads, C head size, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from trimvlm.profile import ActiveRows
from trimvlm.rules import LastRowAttention, RandomOrder, RouterScores, TextAttention, ValueInfluence
from trimvlm.schedule import Row, Schedule
from trimvlm_export import reference_scores
from trimvlm_export.reference_record import Prefill
from trimvlm_export.reference_rows import PromptRows, best
from trimvlm_export.reference_skip import Skipping, redundancy_growth


@dataclass
class Forced:
    """Visual rows taken instead of the best, per selection and per skip stage. None: free running."""

    selected: Sequence[np.ndarray] | None = None
    skipped: Sequence[np.ndarray] | None = None


@dataclass
class PromptRun:
    """State of one prompt, from its prefill through its decode steps.

    Attributes:
        decoder: the Hugging Face text model.
        head: weight of the LM head [V, D].
        embedded: token embeddings [S, D], raw projector outputs for visual rows.
        router_scores: float32 [M*N], or None where nothing selects by them.
        detail: record hidden states and KV.
        first: the layer that the prefill starts at; those before ran densely, elsewhere.
        generated: decode steps done so far.
    """

    schedule: Schedule
    decoder: Any
    head: torch.Tensor
    rows: PromptRows
    embedded: torch.Tensor
    forced: Forced
    router_scores: np.ndarray | None
    cache: DynamicCache
    detail: bool
    first: int = 0
    generated: int = 0
    decoding: bool = False
    prefill: Prefill = field(default_factory=Prefill)

    def __post_init__(self) -> None:
        record, nothing = self.prefill, np.empty(0, np.float32)
        record.live = [np.ones_like(self.rows.is_text)] * self.first
        record.last_row = [nothing] * self.first
        record.hidden = [nothing] * (self.first if self.detail else 0)
        self._live = np.ones_like(self.rows.is_text) if self.first else self.rows.is_text
        self._masked = np.zeros_like(self.rows.is_text)  # live rows below a threshold
        self._masked_at: list[np.ndarray] = [self._masked] * self.first
        self._weights = torch.empty(0)  # [H, S, S] of the layer that ran last
        self._skipping = Skipping.none(len(self.rows.visual))

    def enter(self, row: Row, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """At a layer's input: injection, exit, selection, skip stage. `hidden` and the result: [1, S, D]."""
        if self.decoding:
            return hidden
        rows, record = self.rows, self.prefill
        if row.layer == self.schedule.inject:
            hidden = hidden.clone()
            hidden[0, rows.visual] = self.embedded[rows.visual].to(hidden.dtype)
            self._live = np.ones_like(rows.is_text)
        if row.layer == self.schedule.exit:
            self._live = rows.is_text
        if row.select and not row.selects_inside:
            self._select(row, self._scores(row, layer, hidden))
        if row.skip_stage:
            self._skip(row, hidden)
        record.live.append(self._live)
        self._masked_at.append(self._masked)
        self._note_hidden(hidden)
        return hidden

    def view(self, row: Row, hidden: torch.Tensor) -> dict[str, Any]:
        """What the attention is given: RoPE angles, visible keys, and what happens after the softmax."""
        rows, live = self.rows, self.prefill.live[row.layer]
        shown = ~self._masked_at[row.layer]
        after: dict[str, Any] = {}
        if self.decoding:
            ids = torch.tensor([[rows.next_position(live, self.schedule.positions) + self.generated]])
            ids = ids if rows.coordinates is None else ids.expand(3, 1, 1)
            kept = (rows.is_text | (live & (row.cache == "live"))) & shown
            generated = np.ones(self.generated + 1, dtype=bool)
            visible = torch.from_numpy(np.concatenate([kept, generated]))[None]
        else:
            ids, visible = rows.position_ids(live, self.schedule.positions), rows.causal(live & shown)
            unseen = rows.hidden_keys(row)
            if self.schedule.mask == "post_softmax":
                after["zeroed"] = unseen.to(hidden.device)
                if row.text_keys == "sink":
                    after["sink"] = rows.sink(live).to(hidden.device)
            else:
                visible = visible & ~unseen
        angles = self.decoder.rotary_emb(hidden, ids.to(hidden.device))
        return {"position_embeddings": angles, "visible": visible.to(hidden.device), **after}

    def attended(self, row: Row, output: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """After the attention, with its `output` [1, S, D] and `weights` [1, H, S, P]: what it adds."""
        if not self.decoding:
            self._weights = weights[0]
            looks = row.attends and row.execute == "both"
            self.prefill.last_row.append((self._weights[:, -1] * looks).cpu().numpy())
            if row.selects_inside:
                keys = self._live_keys()
                scores = reference_scores.cross_and_self_attention(self._weights, self.rows.is_text, keys)
                self._select(row, scores)
        return self._take_back(output, row.query) if row.attends else torch.zeros_like(output)

    def fed_forward(self, row: Row, output: torch.Tensor) -> torch.Tensor:
        """After the FFN, with its `output` [1, S, D]: what it adds."""
        return torch.zeros_like(output) if row.sublayers == "attention" else self._take_back(output, row.ffn)

    def leave(self, row: Row, hidden: torch.Tensor, unchanged: torch.Tensor) -> torch.Tensor:
        """At a layer's output; `unchanged` is its input."""
        if row.execute == "none" or (row.execute == "decode" and not self.decoding):
            hidden = unchanged
        if not self.decoding and row.layer == len(self.schedule.rows) - 1:
            self._note_hidden(hidden)
        return hidden

    def start_decoding(self) -> None:
        """After the prefill: from here on there are no visual rows, only cached keys and values."""
        rows = self.schedule.rows
        for mask in self.schedule.masks:
            row = next(row for row in rows if row.masked_by == mask and row.cached)
            self.prefill.visible[mask] = ~self._masked_at[row.layer][self._cache_order(row)]
        if self.detail:
            self.prefill.kv = [self._cached(row) for row in rows]
        self.decoding = True

    def _live_keys(self) -> np.ndarray:
        """Sequence indices of the live visual rows, ascending."""
        return self.rows.visual[self._live[self.rows.visual]]

    def _scores(self, row: Row, layer: Any, hidden: torch.Tensor) -> np.ndarray:
        """Score of each live visual row in a selection at the input of `row`, float32."""
        assert row.select
        rule, rows, keys = row.select.by, self.rows, self._live_keys()
        if not len(keys):
            return np.empty(0, np.float32)
        numbers = np.flatnonzero(self._live[rows.visual])
        if isinstance(rule, RandomOrder):
            return reference_scores.random_order(rule.seed, self.schedule.visual_tokens, rows.images)[numbers]
        if isinstance(rule, RouterScores):
            assert self.router_scores is not None
            return np.asarray(self.router_scores, np.float32)[numbers]
        if isinstance(rule, TextAttention):
            raters = reference_scores.raters(self.embedded, rows.is_text)
            return reference_scores.text_attention(self._weights, raters, keys)
        if isinstance(rule, ValueInfluence):
            before: Any = self.cache.layers[row.layer - 1]
            return reference_scores.value_influence(self._weights, before.values[0], keys)
        assert isinstance(rule, LastRowAttention)
        weights = self._weights
        if rule.attention == "own":  # with this layer's own norm, Wq, Wk and RoPE; .forward: without hooks
            ids = rows.position_ids(self._live, self.schedule.positions).to(hidden.device)
            _, (weights,) = layer.self_attn.forward(
                layer.input_layernorm(hidden),
                position_embeddings=self.decoder.rotary_emb(hidden, ids),
                attention_mask=None,
                visible=rows.causal(self._live & ~self._masked).to(hidden.device),
            )
        return reference_scores.last_row_attention(weights, keys)

    def _select(self, row: Row, scores: np.ndarray) -> None:
        """Keeps the best of the live visual rows, of which `scores` are, and applies a threshold to them."""
        assert row.select
        record, visual = self.prefill, self.rows.visual
        candidates = np.flatnonzero(self._live[visual])
        chosen = candidates[best(scores, row.select.keep * self.rows.images)]
        if self.forced.selected is not None:
            chosen = _given(self.forced.selected[len(record.selected)], candidates, row)
        record.scores.append(scores)
        record.selected.append(chosen)
        self._live = self.rows.is_text.copy()
        self._live[visual[chosen]] = True
        if isinstance(row.select.by, ValueInfluence) and row.select.by.threshold is not None:
            self._masked = self._masked.copy()
            self._masked[visual[candidates[~(scores > row.select.by.threshold)]]] = True

    def _skip(self, row: Row, hidden: torch.Tensor) -> None:
        """Rows enter skip mode at the input of `row`."""
        assert self.schedule.skip
        record, visual = self.prefill, self.rows.visual
        live, text = np.flatnonzero(self._live[visual]), np.flatnonzero(self.rows.is_text)
        growth = redundancy_growth(self.schedule.skip, hidden[0, visual[live]], hidden[0, text], self.head)
        self._skipping.advance(growth, live, row.skipped * self.rows.images)
        if self.forced.skipped is not None:
            self._skipping.rows[:] = False
            self._skipping.rows[_given(self.forced.skipped[len(record.skipped)], live, row)] = True
        record.skip_scores.append(self._skipping.accumulator[live])
        record.skipped.append(np.flatnonzero(self._skipping.rows))

    def _take_back(self, delta: torch.Tensor, active: ActiveRows) -> torch.Tensor:
        """Zeroes what a sub-layer adds, `delta` [1, S, D], to visual rows that do not compute it."""
        if self.decoding or active == "live":
            return delta
        idle = self._skipping.rows if active == "unskipped" else slice(None)
        delta = delta.clone()
        delta[0, self.rows.visual[idle]] = 0
        return delta

    def _cache_order(self, row: Row) -> np.ndarray:
        """Sequence indices of what the layer keeps for decode, visual rows first."""
        live = self.rows.visual[self.prefill.live[row.layer][self.rows.visual]]
        return np.concatenate([live if row.cached else live[:0], np.flatnonzero(self.rows.is_text)])

    def _cached(self, row: Row) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys and values that the layer keeps for decode."""
        if not row.attends or row.layer < self.first:
            return None
        stored: Any = self.cache.layers[row.layer]
        order = self._cache_order(row)
        keys, values = (part[:, :, order].float().cpu().numpy() for part in (stored.keys, stored.values))
        return keys, values

    def _note_hidden(self, hidden: torch.Tensor) -> None:
        if self.detail:
            self.prefill.hidden.append(hidden[0].float().cpu().numpy())


def _given(rows: np.ndarray, live: np.ndarray, row: Row) -> np.ndarray:
    """Visual rows from outside, int64, ascending."""
    assert set(np.asarray(rows)) <= set(live), f"layer {row.layer}: forced rows are not live"
    return np.sort(np.asarray(rows, np.int64))
