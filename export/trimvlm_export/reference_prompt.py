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

from trimvlm.errors import UserError
from trimvlm.profile import ActiveRows
from trimvlm.rules import reads
from trimvlm.schedule import Row, Schedule
from trimvlm_export.reference_rows import PromptRows, best


@dataclass
class Prefill:
    """What one prefill computed. Arrays are float32 unless said otherwise.

    Attributes:
        logits: [V], of the last row.
        selected: per stage, int64 [K]: visual rows that survive, ascending.
        scores: per stage, the score of each visual row that entered, in ascending row order.
        live: per layer, bool [S]: rows in the residual stream while the layer runs.
        last_row: per layer [H, S]: attention weights of the last row; zero where it does not look.
        hidden: L+1 entries [S, D]: the input of each layer (after injection), and the last layer's output.
            Rows that are not live hold values that nobody sees.
        kv: per layer (keys, values), each [1, G, K+T, C], as the graph's `present_*`: cached visual rows
            first, then text rows; None where the layer is not executed.
    """

    logits: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    selected: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)
    live: list[np.ndarray] = field(default_factory=list)
    last_row: list[np.ndarray] = field(default_factory=list)
    hidden: list[np.ndarray] = field(default_factory=list)
    kv: list[tuple[np.ndarray, np.ndarray] | None] = field(default_factory=list)


@dataclass
class PromptRun:
    """State of one prompt, from its prefill through its decode steps.

    Attributes:
        decoder: the Hugging Face text model.
        projected: projector outputs [M*N, D].
        forced: per stage, visual rows to take instead of the best.
        detail: record hidden states and KV.
        first: the layer that the prefill starts at; those before ran densely, elsewhere.
        generated: decode steps done so far.
    """

    schedule: Schedule
    decoder: Any
    rows: PromptRows
    projected: torch.Tensor
    forced: Sequence[np.ndarray] | None
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

    def enter(self, row: Row, layer: Any, hidden: torch.Tensor) -> torch.Tensor:
        """At a layer's input: injection, exit, selection. `hidden` is [1, S, D], and so is the result."""
        if self.decoding:
            return hidden
        rows, record = self.rows, self.prefill
        live = record.live[-1] if record.live else rows.is_text
        if row.layer == self.schedule.inject:
            hidden = hidden.clone()
            hidden[0, rows.visual] = self.projected.to(hidden.dtype)
            live = np.ones_like(rows.is_text)
        if row.layer == self.schedule.exit:
            live = rows.is_text
        if row.select:
            scores = self._scores(row, layer, hidden, live)
            candidates = np.flatnonzero(live[rows.visual])
            chosen = candidates[best(scores, row.select.keep * rows.images)]
            if self.forced is not None:
                chosen = np.sort(np.asarray(self.forced[len(record.selected)], np.int64))
                assert set(chosen) <= set(candidates), f"layer {row.layer}: forced rows are not live"
            record.scores.append(scores)
            record.selected.append(chosen)
            live = rows.is_text.copy()
            live[rows.visual[chosen]] = True
        record.live.append(live)
        self._note_hidden(hidden)
        return hidden

    def view(self, row: Row, hidden: torch.Tensor) -> dict[str, Any]:
        """What the attention is given: RoPE angles, visible keys, weights to zero after the softmax."""
        rows, live, compact = self.rows, self.prefill.live[row.layer], self.schedule.positions == "compact"
        zeroed = None
        if self.decoding:
            first = live.sum() if compact else len(live)
            ids = torch.tensor([[first + self.generated]])
            kept = rows.is_text | (live & (row.cache == "live"))
            generated = np.ones(self.generated + 1, dtype=bool)
            visible = torch.from_numpy(np.concatenate([kept, generated]))[None]
        else:
            ids, visible = rows.position_ids(live, self.schedule.positions), rows.causal(live)
            unseen = rows.hidden_keys(row)
            if self.schedule.mask == "post_softmax":
                zeroed = unseen.to(hidden.device)
            else:
                visible = visible & ~unseen
        angles = self.decoder.rotary_emb(hidden, ids.to(hidden.device))
        return {"position_embeddings": angles, "visible": visible.to(hidden.device), "zeroed": zeroed}

    def note_attention(self, weights: torch.Tensor) -> None:
        """Records the last row of `weights` [1, H, S, S]."""
        if not self.decoding:
            self.prefill.last_row.append(weights[0, :, -1].cpu().numpy())

    def take_back(self, delta: torch.Tensor, active: ActiveRows) -> torch.Tensor:
        """Zeroes what a sub-layer adds, `delta` [1, S, D], to visual rows that do not compute it."""
        if self.decoding or active == "live":
            return delta
        delta = delta.clone()
        delta[0, self.rows.visual] = 0
        return delta

    def leave(self, row: Row, hidden: torch.Tensor) -> torch.Tensor:
        """At a layer's output."""
        if not self.decoding and row.layer == len(self.schedule.rows) - 1:
            self._note_hidden(hidden)
        return hidden

    def start_decoding(self) -> None:
        """After the prefill: from here on there are no visual rows, only cached keys and values."""
        if self.detail:
            self.prefill.kv = [self._cached(row) for row in self.schedule.rows]
        self.decoding = True

    def _scores(self, row: Row, layer: Any, hidden: torch.Tensor, entering: np.ndarray) -> np.ndarray:
        """Score [rows that enter] of the selection at `row`: the last row's attention, mean over heads."""
        assert row.select
        if reads(row.select.by) == "previous":
            last_HS = self.prefill.last_row[-1]
        else:  # an auxiliary attention with this layer's own norm, Wq, Wk and RoPE; .forward: without hooks
            ids = self.rows.position_ids(entering, self.schedule.positions).to(hidden.device)
            _, weights = layer.self_attn.forward(
                layer.input_layernorm(hidden),
                position_embeddings=self.decoder.rotary_emb(hidden, ids),
                attention_mask=None,
                visible=self.rows.causal(entering).to(hidden.device),
            )
            last_HS = weights[0, :, -1].cpu().numpy()
        visual = self.rows.visual
        return last_HS[:, visual[entering[visual]]].mean(axis=0, dtype=np.float32)

    def _cached(self, row: Row) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys and values that the layer keeps for decode, visual rows first."""
        if row.execute == "none" or row.layer < self.first:
            return None
        live_visual = self.rows.visual[self.prefill.live[row.layer][self.rows.visual]]
        kept = live_visual[: len(live_visual) if row.cache == "live" else 0]
        order = np.concatenate([kept, np.flatnonzero(self.rows.is_text)])
        stored: Any = self.cache.layers[row.layer]
        keys, values = (part[:, :, order].float().cpu().numpy() for part in (stored.keys, stored.values))
        return keys, values

    def _note_hidden(self, hidden: torch.Tensor) -> None:
        if self.detail:
            self.prefill.hidden.append(hidden[0].float().cpu().numpy())


def check_resume(schedule: Schedule, first: int) -> None:
    """Refuses to start at layer `first` with the input that it has in the dense model.

    Raises:
        UserError: the Schedule does something before that layer, or ranks by the layer before it.
    """
    tokens = schedule.visual_tokens
    if not 0 <= first < len(schedule.rows):
        raise UserError(f"resume: layer {first} is not within 0..{len(schedule.rows) - 1}")
    for row in schedule.rows[:first]:
        if row != Row(layer=row.layer, live=tokens, after=tokens):
            raise UserError(
                f"resume: layer {row.layer} is not as in the dense model; resume at or before layer "
                f"{row.layer}"
            )
    select = schedule.rows[first].select
    if first and select and reads(select.by) == "previous":
        raise UserError(
            f"resume: layer {first} selects by the attention of layer {first - 1}; resume at or before layer "
            f"{first - 1}"
        )
