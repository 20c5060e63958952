"""The exported decoder: a Llama-style decoder that computes only the rows that a Schedule keeps.

One module serves prefill and decode. Rows are laid out visual first, then text, whatever their order in the
prompt: which row sees which is decided by position ids alone, so a layer without visual queries is a slice,
and the order of keys in the cache does not matter. At decode there are no visual rows; every selection and
slice is then the identity, since a stage keeps `rows * keep // before` rows.

Shares the Schedule with the reference, and no code. Shapes: T text rows, N visual rows (all images), R rows
in the stream, P past rows, H heads, G key/value heads, C head size, D width, V vocabulary, K kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trimvlm.errors import UserError
from trimvlm.rules import reads
from trimvlm.schedule import Row, Schedule
from trimvlm_export.operators import attention, attention_weights, repeat_heads, rms_norm, rope


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The residual stream and what describes its rows.

    Attributes:
        hidden: [R, D].
        visual: how many of the R rows are visual (they come first).
        positions: int64 [R], in the full unpruned sequence.
        index: int64 [visual], which rows of the graph's `visual` input are alive, ascending.
        causal: bool [R, R], row i may see row j.
        memo: what was already made for these rows (rotary tables, masks), shared by all their layers.
    """

    hidden: Tensor
    visual: int
    positions: Tensor
    index: Tensor
    causal: Tensor
    memo: dict[Any, Any]

    @classmethod
    def of(cls, hidden: Tensor, positions: Tensor, index: Tensor) -> Stream:
        return cls(
            hidden=hidden,
            visual=index.shape[0],
            positions=positions,
            index=index,
            causal=positions.unsqueeze(1) >= positions.unsqueeze(0),
            memo={},
        )

    def keep(self, kept_K: Tensor) -> tuple[Stream, Tensor]:
        """Drops visual rows. Returns the stream and the row numbers [R'] that remain of the old one."""
        text = torch.arange(self.visual, self.hidden.shape[0])
        rows = torch.cat((kept_K, text))
        hidden, positions = self.hidden.index_select(0, rows), self.positions.index_select(0, rows)
        return Stream.of(hidden, positions, self.index.index_select(0, kept_K)), rows

    def add(self, delta: Tensor, *, text_only: bool) -> Stream:
        """Adds a sub-layer's output to the rows that computed it."""
        if not text_only:
            return replace(self, hidden=self.hidden + delta)
        visual, text = self.hidden[: self.visual], self.hidden[self.visual :]
        return replace(self, hidden=torch.cat((visual, text + delta)))


class Attention(nn.Module):
    """Projections of one layer; names as in the checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, kv_width = (
            config.head_dim * config.num_attention_heads,
            config.head_dim * config.num_key_value_heads,
        )
        bias = bool(getattr(config, "attention_bias", False))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=bias)


class Mlp(nn.Module):
    """Gated FFN; names as in the checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_RD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_RD)) * self.up_proj(x_RD))


class Norm(nn.Module):
    """RMS norm; the name as in the checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x_RD: Tensor) -> Tensor:
        return rms_norm(x_RD, self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer's weights; names as in the checkpoint."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = Norm(config)
        self.post_attention_layernorm = Norm(config)


class Decoder(nn.Module):
    """A Llama-style decoder under a Schedule. Inputs and outputs: `trimvlm.bundle`.

    Args:
        config: transformers' text config (`hidden_act` silu, gated MLP).
        schedule: resolved for this model.
        inv_freq: float32 [C/2], rotary frequencies as transformers computes them for this config.
        rope_scale: factor on cos and sin (transformers' `attention_scaling`).
    """

    def __init__(self, config: Any, schedule: Schedule, inv_freq: Tensor, rope_scale: float) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise UserError(f"text_config.hidden_act: {config.hidden_act!r} is not supported, only 'silu'")
        self.schedule, self.rope_scale = schedule, rope_scale
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = Norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)

    def forward(  # noqa: PLR0917 - the order of the graph's inputs
        self,
        input_ids: Tensor,
        visual: Tensor,
        text_positions: Tensor,
        visual_positions: Tensor,
        forced: list[Tensor],
        past_key: list[Tensor],
        past_value: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Returns logits [1, V], present keys, present values, selected indices, scores."""
        text = self.embed_tokens(input_ids)
        index = torch.arange(visual.shape[0])
        stream = Stream.of(text, text_positions, index[:0])
        present_key: list[Tensor] = []
        present_value: list[Tensor] = []
        selected: list[Tensor] = []
        scores: list[Tensor] = []
        pasts = iter(zip(past_key, past_value, strict=True))
        last_scores: Tensor | None = None
        for row in self.schedule.rows:
            if row.layer == self.schedule.inject:
                stream = Stream.of(
                    torch.cat((visual, text if row.layer == 0 else stream.hidden)),
                    torch.cat((visual_positions, text_positions)),
                    index,
                )
            if row.layer == self.schedule.exit:
                stream = Stream.of(stream.hidden[stream.visual :], text_positions, index[:0])
            past = next(pasts) if row.execute == "both" else None
            normed = keys = None
            if row.select:
                if reads(row.select.by) == "own":
                    assert past is not None
                    normed, keys, last_scores = self._own_scores(row, stream, past[0])
                assert last_scores is not None
                kept = self._choose(row, last_scores, forced[len(selected)], stream.index)
                scores.append(last_scores)
                stream, rows = stream.keep(kept)
                selected.append(stream.index)
                if normed is not None:
                    assert keys is not None
                    normed = normed.index_select(0, rows)
                    keys = keys.index_select(2, rows) if self.schedule.positions == "persistent" else None
            if past is None:
                continue
            following = self.schedule.rows[row.layer + 1] if row.layer + 1 < len(self.schedule.rows) else None
            wanted = bool(following and following.select and reads(following.select.by) == "previous")
            stream, key, value, last_scores = self._layer(
                row, stream, past, normed=normed, keys=keys, score=wanted
            )
            present_key.append(key)
            present_value.append(value)
        logits = self.lm_head(self.norm(stream.hidden[-1:]))
        return logits.float(), present_key, present_value, selected, scores

    def _weights(self, row: Row) -> Layer:
        layer = self.layers[row.layer]
        assert isinstance(layer, Layer)
        return layer

    def _layer(
        self,
        row: Row,
        stream: Stream,
        past: tuple[Tensor, Tensor],
        *,
        normed: Tensor | None,
        keys: Tensor | None,
        score: bool,
    ) -> tuple[Stream, Tensor, Tensor, Tensor | None]:
        layer = self._weights(row)
        text_query, text_ffn = row.query == "none" and row.live > 0, row.ffn == "none" and row.live > 0
        x = layer.input_layernorm(stream.hidden) if normed is None else normed
        cos, sin = self._rope(stream, past[0])
        if keys is None:
            keys = rope(self._heads(layer.self_attn.k_proj(x), self.kv_heads), cos, sin)
        values = self._heads(layer.self_attn.v_proj(x), self.kv_heads)
        start = stream.visual if text_query else 0
        queries = rope(self._heads(layer.self_attn.q_proj(x[start:]), self.heads), cos[start:], sin[start:])
        all_keys, all_values = torch.cat((past[0], keys), dim=2), torch.cat((past[1], values), dim=2)
        visible = self._visible(row, stream, past[0])
        out = self._attend(row, stream, visible, q=queries, k=all_keys, v=all_values)
        out = out.transpose(1, 2).reshape(out.shape[2], self.heads * self.head_dim)
        stream_after = stream.add(layer.self_attn.o_proj(out), text_only=text_query)
        scores = None
        if score:
            # Everything live is before the last row, so only `text_keys` could hide a key, and the
            # Schedule refuses to rank by such a layer.
            scores = self._last_row_scores(queries[:, :, -1:], all_keys, past[0].shape[2], stream.visual)
        rows = stream_after.hidden[stream.visual :] if text_ffn else stream_after.hidden
        delta = layer.mlp(layer.post_attention_layernorm(rows))
        stream_after = stream_after.add(delta, text_only=text_ffn)
        if row.cached or not row.live:
            return stream_after, all_keys, all_values, scores
        key = torch.cat((past[0], keys[:, :, stream.visual :]), dim=2)
        value = torch.cat((past[1], values[:, :, stream.visual :]), dim=2)
        return stream_after, key, value, scores

    def _attend(
        self, row: Row, stream: Stream, visible: Tensor, *, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        hides = row.live > 0 and "none" in (row.text_keys, row.visual_keys)
        if self.schedule.mask == "additive" or not hides:
            return attention(q, k, v, visible)
        # VisiPruner: hidden keys take part in the softmax, then lose their weight (methods 2.4).
        rows = stream.hidden.shape[0]
        causal = _after_past(stream.causal[rows - q.shape[2] :], k.shape[2] - rows)
        weights = attention_weights(q, k, causal) * visible
        return weights.to(v.dtype) @ repeat_heads(v, q.shape[1])

    def _own_scores(self, row: Row, stream: Stream, past_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Auxiliary attention of the last row with this layer's own weights (HiDivDrop section 3.3)."""
        layer = self._weights(row)
        x = layer.input_layernorm(stream.hidden)
        cos, sin = self._rope(stream, past_key)
        keys = rope(self._heads(layer.self_attn.k_proj(x), self.kv_heads), cos, sin)
        # A gathered row has the static length 1; TensorRT-RTX refuses a slice of unknown length here.
        cos, sin = cos[-1].unsqueeze(0), sin[-1].unsqueeze(0)
        query = rope(self._heads(layer.self_attn.q_proj(x[-1:]), self.heads), cos, sin)
        all_keys = torch.cat((past_key, keys), dim=2)
        return x, keys, self._last_row_scores(query, all_keys, past_key.shape[2], stream.visual)

    def _last_row_scores(self, query: Tensor, keys: Tensor, past: int, visual: int) -> Tensor:
        """float32 [visual]: attention of one row, mean over heads."""
        weights = attention_weights(query, keys).mean(dim=1)
        return weights.reshape(-1)[past : past + visual]

    def _choose(self, row: Row, scores: Tensor, forced: Tensor, index: Tensor) -> Tensor:
        """Rows of the stream that stay, ascending; `forced` holds input row numbers, or nothing."""
        assert row.select
        before = self.schedule.live_before(row.layer)
        count = scores.shape[0] * row.select.keep // before
        best = torch.topk(scores, count).indices
        given = (index.unsqueeze(0) < forced.unsqueeze(1)).sum(dim=1)
        # Parity feeds all `count` rows in `forced`; otherwise it has none and the ranking decides.
        chosen = torch.cat((given, best))[:count].int()
        return torch.topk(chosen, count, largest=False).values.long()

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[R, heads * C] -> [1, heads, R, C]."""
        return x.reshape(1, x.shape[0], heads, self.head_dim).transpose(1, 2)

    def _rope(self, stream: Stream, past_key: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [R, C/2], made once per set of rows."""
        found = stream.memo.get("rope")
        if found is None:
            positions = stream.positions
            if self.schedule.positions == "compact":
                # Ids restart at the length of this layer's cache: rows that were dropped leave no gap.
                positions = past_key.shape[2] + stream.causal.sum(dim=1) - 1
            angles = positions.float().unsqueeze(1) * self.inv_freq.unsqueeze(0)
            dtype = self.norm.weight.dtype
            found = (
                (torch.cos(angles) * self.rope_scale).to(dtype),
                (torch.sin(angles) * self.rope_scale).to(dtype),
            )
            stream.memo["rope"] = found
        return found

    def _visible(self, row: Row, stream: Stream, past_key: Tensor) -> Tensor:
        """bool [queries, P + R], made once per set of rows, past length and kind of hiding."""
        text_query = row.query == "none" and row.live > 0
        key = (row.cached, text_query, row.text_keys, row.visual_keys)
        found = stream.memo.get(key)
        if found is None:
            rows = stream.causal.shape[0]
            is_visual = torch.arange(rows) < stream.visual
            visible = stream.causal
            if row.live and row.text_keys == "none":
                visible = visible & (is_visual.unsqueeze(1) | ~is_visual.unsqueeze(0))
            if row.live and row.visual_keys == "none":
                visible = visible & (~is_visual.unsqueeze(1) | ~is_visual.unsqueeze(0))
            found = _after_past(visible[stream.visual :] if text_query else visible, past_key.shape[2])
            stream.memo[key] = found
        return found


def _after_past(visible: Tensor, past: int) -> Tensor:
    """Every past key is visible: [Q, R] -> [Q, P + R]."""
    return torch.cat((torch.ones(visible.shape[0], past, dtype=torch.bool), visible), dim=1)
