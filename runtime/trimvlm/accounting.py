"""What a Schedule costs, from the Schedule alone: FLOPs in both published conventions, KV bytes.

Two conventions, because the papers use two (n visual rows, t text rows, d width, m FFN width):

* MACV: visual rows only, one multiply-accumulate = 1, `4nd^2 + 2n^2d + 3ndm` per layer
  (PyramidDrop, HiDivDrop, VisiPruner);
* MAC2: all rows, 2 per multiply-accumulate, no causal halving, no LM head (V-Skip, SPIDER, VTW, ShortV).

Scoring rows of a selection are counted in neither paper; `selection_flops` gives them apart, in MAC2.
"""

from __future__ import annotations

from trimvlm.profile import ModelSpec
from trimvlm.schedule import Row, Schedule


def macv(schedule: Schedule) -> int:
    """Multiply-accumulates of the visual rows of one image, over all layers."""
    return sum(_layer_macs(schedule.model, row, 0) for row in schedule.rows)


def mac2(schedule: Schedule, text: int) -> int:
    """FLOPs of a prefill with one image and `text` text rows: 2 per multiply-accumulate, no LM head."""
    return sum(2 * _layer_macs(schedule.model, row, text) for row in schedule.rows)


def selection_flops(schedule: Schedule, text: int) -> int:
    """FLOPs (MAC2) that scoring adds: one query row against all keys, and the keys of rows that drop out."""
    model, total = schedule.model, 0
    width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for row in schedule.stages:
        assert row.select
        before = schedule.live_before(row.layer)
        total += 2 * width * (before + text)
        if row.select.by.attention == "own":
            total += 2 * (before - row.live) * model.hidden * kv_width
    return total


def kv_bytes_per_layer(schedule: Schedule, text: int, bytes_per_value: int) -> tuple[int, ...]:
    """Bytes of keys and values that each layer caches for one image and `text` text rows."""
    model = schedule.model
    per_row = 2 * model.kv_heads * model.head_dim * bytes_per_value
    return tuple(per_row * (row.cached + text) if row.execute == "both" else 0 for row in schedule.rows)


def _layer_macs(model: ModelSpec, row: Row, text: int) -> int:
    """Multiply-accumulates of one layer. `text` = 0 gives the visual rows alone (MACV)."""
    if row.execute == "none":
        return 0
    d, width, kv_width = model.hidden, model.heads * model.head_dim, model.kv_heads * model.head_dim
    projections = (2 * d * width) * (text + row.queries) + (2 * d * kv_width) * (text + row.live)
    text_pairs = text * (text + (row.live if row.text_keys == "live" else 0))
    visual_pairs = row.queries * (text + (row.live if row.visual_keys == "live" else 0))
    attention = 2 * width * (text_pairs + visual_pairs)
    return projections + attention + 3 * d * model.ffn * (text + row.ffn_rows)
