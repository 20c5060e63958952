"""The exported decoder: a Llama-style decoder that computes only the rows that a Schedule keeps.

One module serves prefill and decode. Rows are laid out visual first, then text, whatever their order in the
prompt: which row sees which is decided by position ids alone, so a layer without visual queries is a slice,
and the order of keys in the cache does not matter. At decode there are no visual rows; every selection and
slice is then the identity, since a stage keeps `images * keep` rows. A filled decoder (`trimvlm.filling`)
has one filler row before the visual rows and one before each past, and so no empty tensor.

Shares the Schedule with the reference, and no code. Shapes: T text rows, N visual rows (all images), R rows
in the stream, P past rows, H heads, G key/value heads, C head size, D width, V vocabulary, K kept rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.errors import UserError
from trimvlm.rules import RandomOrder, RouterScores, TextAttention, ValueInfluence, reads
from trimvlm.schedule import Row, Schedule
from trimvlm_export import decoder_scores as ranking
from trimvlm_export.decoder_attention import Attended, shown_keys, to_cache
from trimvlm_export.decoder_run import Made, Outputs, Run
from trimvlm_export.decoder_skip import enter, gain
from trimvlm_export.decoder_stream import EveryRow, LastRow, Part, Stream
from trimvlm_export.decoder_weights import Layer, Norm
from trimvlm_export.operators import rope


class Decoder(nn.Module):
    """A Llama-style decoder under a Schedule. Inputs and outputs: `trimvlm.bundle`.

    Args:
        config: transformers' text config (`hidden_act` silu, gated MLP).
        schedule: resolved for this model.
        inv_freq: float32 [C/2], rotary frequencies as transformers computes them for this config.
        axes: with M-RoPE: int64 [C/2], the coordinate that each frequency turns with.
        rope_scale: factor on cos and sin (transformers' `attention_scaling`).
        biases: projections of a layer that have one, e.g. `q_proj`.
        filled: see `trimvlm.filling`.
    """

    def __init__(
        self,
        config: Any,
        schedule: Schedule,
        inv_freq: Tensor,
        rope_scale: float,
        *,
        axes: Tensor | None = None,
        biases: Collection[str] = (),
        filled: bool = False,
    ) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise UserError(f"text_config.hidden_act: {config.hidden_act!r} is not supported, only 'silu'")
        self.schedule, self.rope_scale, self.filled = schedule, rope_scale, int(filled)
        model = schedule.model
        self.heads, self.kv_heads, self.head_dim = model.heads, model.kv_heads, model.head_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, model, biases) for _ in range(model.layers))
        self.norm = Norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq.float(), persistent=False)
        self.axes: Tensor | None
        self.register_buffer("axes", axes, persistent=False)

    def forward(
        self,
        *,
        input_ids: Tensor,
        visual: Tensor,
        text_positions: Tensor,
        visual_positions: Tensor,
        text_coordinates: Tensor | None = None,
        visual_coordinates: Tensor | None = None,
        router_scores: Tensor | None = None,
        forced: Sequence[Tensor] = (),
        forced_skip: Sequence[Tensor] = (),
        past_key: Sequence[Tensor],
        past_value: Sequence[Tensor],
        past_visible: Sequence[Tensor] = (),
    ) -> Outputs:
        """Lists hold one tensor per stage, per layer with keys and values, or per entry of `masks`."""
        text = self.embed_tokens(input_ids)
        index = torch.arange(visual.shape[0])
        alone = {"index": index[:0], "filled": self.filled}  # without visual rows
        stream = Stream.of(text, text_positions, coordinates=text_coordinates, **alone)
        run = Run(
            images=(visual.shape[0] - self.filled) // self.schedule.visual_tokens,
            forced=forced,
            forced_skip=forced_skip,
            router_scores=router_scores,
            past=iter(zip(past_key, past_value, strict=True)),
            past_visible=dict(zip(self.schedule.masks, past_visible, strict=True)),
        )
        if any(row.select and isinstance(row.select.by, TextAttention) for row in self.schedule.rows):
            run.raters = ranking.raters_of(visual, text, visual_positions, text_positions, fill=self.filled)
        for row in self.schedule.rows:
            if row.layer == self.schedule.inject:
                stream = Stream.of(
                    torch.cat((visual, text if row.layer == 0 else stream.hidden)),
                    torch.cat((visual_positions, text_positions)),
                    index,
                    coordinates=torch.cat((visual_coordinates, text_coordinates), dim=1)
                    if visual_coordinates is not None and text_coordinates is not None
                    else None,
                    filled=self.filled,
                    fill=self.filled,
                )
            if row.layer == self.schedule.exit:
                text_rows = stream.hidden[stream.visual :]
                stream = Stream.of(text_rows, text_positions, coordinates=text_coordinates, **alone)
            stream = self._layer(row, stream, run)
        logits = self.lm_head(self.norm(stream.hidden[-1:]))
        shown = [run.present_visible[stage] for stage in self.schedule.masks]
        return run.out._replace(logits=logits.float(), present_visible=shown)

    def _layer(self, row: Row, stream: Stream, run: Run) -> Stream:
        past = next(run.past) if row.attends else None
        if row.skip_stage:
            stream = self._skip(row, stream, run)
        made = None
        if row.select and not row.selects_inside:
            stream, made = self._select(row, stream, run, past)
        if row.execute == "none":
            return stream
        if past is not None:
            run.before = self._attend(row, stream, run, past, made)
            if row.execute == "decode":
                return self._at_decode_only(row, stream, run.before)
        if self._ends(row):
            return replace(stream, hidden=self._last_row(row, stream, run.before if past else None))
        if past is not None:
            assert run.before
            stream = self._attention(row, stream, run, run.before)
        if row.sublayers == "attention":
            return stream
        part = stream.part(row.ffn)
        return stream.add(part, self._weights(row).ffn(part.take(stream.hidden)))

    def _attend(
        self, row: Row, stream: Stream, run: Run, past: tuple[Tensor, Tensor], made: Made | None
    ) -> Attended:
        """Queries, keys and values of a layer; puts out what it caches."""
        layer = self._weights(row)
        alone = row.execute == "decode" or self._ends(row)
        part = LastRow() if alone else stream.part(row.query)
        x = layer.input_layernorm(stream.hidden) if made is None else made.normed
        keys = self._keys(row, stream, x, past[0]) if made is None or made.keys is None else made.keys
        values = self._heads(layer.self_attn.v_proj(x), self.kv_heads)
        queries = self._heads(layer.self_attn.q_proj(part.take(x)), self.heads)
        attended = Attended(
            row=row,
            stream=stream,
            part=part,
            queries=rope(queries, *self._rope(stream, past[0], part)),
            keys=torch.cat((past[0], keys), dim=2),
            values=torch.cat((past[1], values), dim=2),
            past=past[0].shape[2],
            past_visible=run.visible_past(row),
        )
        present = to_cache(attended, past[0], keys), to_cache(attended, past[1], values)
        run.out.present_key.append(attended.keys if present[0] is None else present[0])
        run.out.present_value.append(attended.values if present[1] is None else present[1])
        shown = attended.shown_later()
        if row.masked_by is not None and shown is not None:
            run.present_visible.setdefault(row.masked_by, shown)
        return attended

    def _attention(self, row: Row, stream: Stream, run: Run, attended: Attended) -> Stream:
        """Adds the attention's output; drops rows here where the selection acts inside the layer."""
        if not row.selects_inside:
            out = attended.output(self.schedule.mask)
            return stream.add(attended.part, self._projected(row, out))
        weights = attended.weights()
        scores = ranking.cross_and_self_attention(weights, attended.past, stream)
        stream, rows = self._keep(row, stream, scores, run)
        out = attended.mixed(weights.index_select(2, rows))
        return stream.add(stream.part("live"), self._projected(row, out))

    def _at_decode_only(self, row: Row, stream: Stream, attended: Attended) -> Stream:
        """The layer for the last row, which is the only one at decode; at prefill that row's result is thrown
        away. One row costs nothing beside the others, and its length is known to builders."""
        before = attended.part.take(stream.hidden)
        after = self._last_row(row, stream, attended)
        decoding = torch.arange(1).unsqueeze(1) < attended.past - self.filled
        return replace(stream, hidden=attended.part.put(stream.hidden, torch.where(decoding, after, before)))

    def _ends(self, row: Row) -> bool:
        """Whether nothing reads what the layer makes of other rows than the last: the last layer's."""
        last = row.layer == self.schedule.model.layers - 1
        return last and row.execute != "none" and not row.selects_inside

    def _last_row(self, row: Row, stream: Stream, attended: Attended | None) -> Tensor:
        """The layer for the last row alone, a text row: [1, D]."""
        x = LastRow().take(stream.hidden)
        if attended is not None:
            x = x + self._projected(row, attended.output(self.schedule.mask))
        return x if row.sublayers == "attention" else x + self._weights(row).ffn(x)

    def _skip(self, row: Row, stream: Stream, run: Run) -> Stream:
        assert self.schedule.skip
        stream, run.skipping = enter(
            row,
            stream,
            run.skipping,
            gained=gain(self.schedule.skip, stream, self.lm_head),
            count=run.images * row.skipped + stream.fill,
            forced=run.forced_skip[len(run.out.skipped)],
        )
        run.out.skipped.append(stream.index.index_select(0, run.skipping.rows))
        run.out.skip_scores.append(run.skipping.accumulator)
        return stream

    def _select(
        self, row: Row, stream: Stream, run: Run, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Stream, Made | None]:
        """A selection at the layer's input."""
        assert row.select
        rule, made = row.select.by, None
        if reads(rule) == "own":
            assert past is not None
            made, scores = self._own_scores(row, stream, run, past[0])
        elif isinstance(rule, RandomOrder):
            scores = ranking.random_order(rule.seed, self.schedule.visual_tokens, stream)
        elif isinstance(rule, RouterScores):
            assert run.router_scores is not None
            scores = run.router_scores.index_select(0, stream.index)
        else:
            assert run.before
            scores = ranking.by_previous_layer(rule, run.before, run.raters)
        stream, rows = self._keep(row, stream, scores, run)
        return stream, made and made.rows(rows, same_positions=self.schedule.positions == "persistent")

    def _keep(self, row: Row, stream: Stream, scores: Tensor, run: Run) -> tuple[Stream, Tensor]:
        """Only the best rows, and the numbers of all rows that stay."""
        assert row.select
        count = run.images * row.select.keep + stream.fill
        kept = ranking.choose(scores, count, run.forced[len(run.out.selected)], stream)
        stream, rows = stream.keep(kept)
        if isinstance(row.select.by, ValueInfluence) and row.select.by.threshold is not None:
            # What an earlier threshold hides has no weight, so its score is 0 and it stays hidden.
            stream = stream.show_only(scores.index_select(0, kept) > row.select.by.threshold)
        run.out.scores.append(scores)
        run.out.selected.append(stream.index)
        return stream, rows

    def _own_scores(self, row: Row, stream: Stream, run: Run, past_key: Tensor) -> tuple[Made, Tensor]:
        """Auxiliary attention of the last row with this layer's own weights (HiDivDrop section 3.3)."""
        layer, past = self._weights(row), past_key.shape[2]
        x = layer.input_layernorm(stream.hidden)
        keys = self._keys(row, stream, x, past_key)
        query = self._heads(layer.self_attn.q_proj(x[-1:]), self.heads)
        query = rope(query, *self._rope(stream, past_key, LastRow()))
        shown = shown_keys(stream, past, run.visible_past(row))
        weights = ranking.last_row_weights(query, torch.cat((past_key, keys), dim=2), shown)
        scores = ranking.visual_columns(weights.mean(dim=1).reshape(-1), past, stream.visual)
        return Made(x, keys), scores

    def _keys(self, row: Row, stream: Stream, x: Tensor, past_key: Tensor) -> Tensor:
        keys = self._heads(self._weights(row).self_attn.k_proj(x), self.kv_heads)
        return rope(keys, *self._rope(stream, past_key, EveryRow()))

    def _projected(self, row: Row, out: Tensor) -> Tensor:
        """Attention's [1, H, R, C] through the output projection: [R, D]."""
        out = out.transpose(1, 2).reshape(out.shape[2], self.heads * self.head_dim)
        return self._weights(row).self_attn.o_proj(out)

    def _weights(self, row: Row) -> Layer:
        layer = self.layers[row.layer]
        assert isinstance(layer, Layer)
        return layer

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[R, heads * C] -> [1, heads, R, C]."""
        return x.reshape(1, x.shape[0], heads, self.head_dim).transpose(1, 2)

    def _rope(self, stream: Stream, past_key: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """cos and sin [part, C/2], made once per set of rows."""
        memo = ("rope", part.name)
        if memo not in stream.memo:
            if not isinstance(part, EveryRow):
                cos, sin = self._rope(stream, past_key, EveryRow())
                stream.memo[memo] = part.take(cos), part.take(sin)
                return stream.memo[memo]
            positions = stream.positions
            if self.schedule.positions == "compact":
                # Ids restart at the length of this layer's cache: rows that were dropped leave no gap.
                positions = past_key.shape[2] - self.filled + stream.causal.sum(dim=1) - 1
            turns = positions.unsqueeze(1)
            if stream.coordinates is not None and self.axes is not None:
                turns = stream.coordinates.index_select(0, self.axes).transpose(0, 1)
            angles = turns.float() * self.inv_freq.unsqueeze(0)
            dtype = self.norm.weight.dtype
            stream.memo[memo] = (
                (torch.cos(angles) * self.rope_scale).to(dtype),
                (torch.sin(angles) * self.rope_scale).to(dtype),
            )
        return stream.memo[memo]
