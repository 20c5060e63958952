"""What a Schedule costs, from the Schedule alone: FLOPs in both published conventions, KV bytes.

Two conventions, because the papers use two (n visual rows, t text rows, d width, m FFN width):

* MACV: visual rows only, one multiply-accumulate = 1, `4nd^2 + 2n^2d + 3ndm` per layer
  (PyramidDrop, HiDivDrop, VisiPruner);
* MAC2: all rows, 2 per multiply-accumulate, no causal halving, no LM head (V-Skip, SPIDER, VTW, ShortV).

What ranks tokens is counted in neither; `selection_flops` and `router_flops` give it apart, in MAC2, and
`left_out` and `hidden_pairs` what exported decoders save without changing any result.
"""

from __future__ import annotations

from itertools import pairwise

from trimvlm.profile import ModelSpec
from trimvlm.router_spec import RouterSpec
from trimvlm.rules import LastRowAttention, TextAttention, ValueInfluence
from trimvlm.schedule import Row, Schedule

PIECE_ROWS, MOST_PIECES = 192, 8  # of visual rows, see `attention_pieces`


def macv(schedule: Schedule) -> int:
    """Multiply-accumulates of the visual rows of one image, over all layers."""
    return sum(_layer_macs(schedule.model, row, 0) for row in schedule.rows)


def mac2(schedule: Schedule, text: int) -> int:
    """FLOPs of a prefill with one image and `text` text rows: 2 per multiply-accumulate, no LM head."""
    return sum(2 * _layer_macs(schedule.model, row, text) for row in schedule.rows)


def left_out(schedule: Schedule, text: int) -> int:
    """FLOPs (MAC2) of one image and `text` text rows that the exported decoder does not run.

    Nothing reads what the last layer makes of other rows than the last: past its keys and values it computes
    that row alone. No paper counts so.
    """
    row, model = schedule.rows[-1], schedule.model
    if row.layer != model.layers - 1 or row.execute != "both" or row.selects_inside:
        return 0
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    run = 0
    if row.attends:
        pairs = text + (0 if row.text_keys == "none" else row.live)
        run = 2 * model.hidden * (kv_width * (text + row.live) + width) + 2 * width * pairs
    if row.sublayers != "attention":
        run += 3 * model.hidden * model.ffn
    return 2 * (_layer_macs(model, row, text) - run)


def attention_pieces(schedule: Schedule, row: Row) -> int:
    """Into how many pieces the decoder for ONNX Runtime's CPU cuts a layer's visual queries, where its cache
    grows in place; each is given no visual keys after its own. 1: attention is one operator.

    Figures are in decision 0028.
    """
    whole = row.attends and row.execute == "both" and row.query == "live" and not row.selects_inside
    sees = row.visual_keys == "live" or schedule.mask == "post_softmax"
    copied = loses_weights(schedule, row) and (row.masked_by is not None or row.cached != row.live)
    if not whole or not sees or copied or row.layer == schedule.model.layers - 1:
        return 1
    return max(1, min(MOST_PIECES, row.live // PIECE_ROWS))


def loses_weights(schedule: Schedule, row: Row) -> bool:
    """Whether a layer takes attention weights of a prompt's rows away after the softmax."""
    hides = (row.text_keys, row.visual_keys) != ("live", "live")
    return schedule.mask == "post_softmax" and row.attends and row.execute == "both" and hides


def hidden_pairs(schedule: Schedule) -> tuple[int, ...]:
    """FLOPs (MAC2) of each layer's attention that `attention_pieces` leaves out, for one image: scores of
    visual rows with visual keys after their piece. A layer that caches other rows than it reads is whole in
    the graph; it is counted as cut here."""
    model, found = schedule.model, []
    for row in schedule.rows:
        pieces = attention_pieces(schedule, row)
        ends = [row.live * number // pieces for number in range(pieces + 1)]
        pairs = sum((end - start) * (row.live - end) for start, end in pairwise(ends))
        found.append(4 * model.heads * model.head_dim * pairs)
    return tuple(found)


def selection_flops(schedule: Schedule, text: int) -> int:
    """FLOPs (MAC2) of scoring for one image: what ranks tokens and what skip stages read.

    Counted: attention weights that only the ranking needs, the keys of rows that drop out before their layer,
    norms of values (`value_influence`), raters (`text_attention`), and in skip stages the LM head over every
    live visual row (`entropy`) and the cosine with the mean text row (`correlation`). Sums, sorting and
    softmaxes are not.
    """
    total = sum(2 * _ranking_macs(schedule, row, text) for row in schedule.stages)
    for row in schedule.skip_stages:
        assert schedule.skip
        terms = schedule.skip.entropy * schedule.model.vocab + schedule.skip.correlation
        total += 2 * row.live * schedule.model.hidden * terms
    return total


def router_flops(router: RouterSpec | None, schedule: Schedule, text: int) -> int:
    """FLOPs (MAC2) of a router's matrices and attention, for one image and `text` text rows."""
    if router is None:
        return 0
    width, tokens = router.width, schedule.model.layers - router.first
    prompt = schedule.visual_tokens + text
    rows = prompt + tokens
    block = (4 + 3 * 4) * width * width * rows + 2 * width * rows * rows
    return 2 * (prompt * schedule.model.hidden * width + block + (schedule.visual_tokens + tokens) * width)


def kv_bytes_per_layer(schedule: Schedule, text: int, bytes_per_value: int) -> tuple[int, ...]:
    """Bytes of keys and values that each layer caches for one image and `text` text rows."""
    model = schedule.model
    per_row = 2 * model.kv_heads * model.head_dim * bytes_per_value
    return tuple(per_row * (row.cached + text) if row.attends else 0 for row in schedule.rows)


def _ranking_macs(schedule: Schedule, row: Row, text: int) -> int:
    """Multiply-accumulates of one selection's scores."""
    assert row.select
    model, rule, before = schedule.model, row.select.by, schedule.live_before(row.layer)
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if isinstance(rule, LastRowAttention):
        keys_of_dropped = (before - row.live) * model.hidden * kv_width if rule.attention == "own" else 0
        return width * (before + text) + keys_of_dropped
    if isinstance(rule, TextAttention):
        return width * text * (before + text) + schedule.visual_tokens * text * model.hidden
    if isinstance(rule, ValueInfluence):
        return width * (before + text) + before * kv_width
    return 0  # ranked by weights that the layer computes anyway, or by none


def _layer_macs(model: ModelSpec, row: Row, text: int) -> int:
    """Multiply-accumulates of one layer. `text` = 0 gives the visual rows alone (MACV)."""
    if row.execute == "none":
        return 0
    d, width, kv_width = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    total = 0
    if row.attends:
        total += (2 * d * kv_width) * (text + row.live)
    if row.execute == "decode":
        return total
    if row.attends:
        # A selection inside the layer acts between attention and output projection.
        outputs = row.after if row.selects_inside else row.queries
        total += d * width * (text + row.queries) + d * width * (text + outputs)
        text_pairs = text * (text + (0 if row.text_keys == "none" else row.live))
        visual_pairs = row.queries * (text + (row.live if row.visual_keys == "live" else 0))
        total += 2 * width * (text_pairs + visual_pairs)
    return total + 3 * d * model.ffn * ((text if row.sublayers != "attention" else 0) + row.ffn_rows)
