"""Prefix reuse: a candidate starts at the first layer that it changes, from the dense model's hidden state.

Leaving out each of L layers in turn then costs (L + 1) / 2 + 1 prefills per sample, not L + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimvlm.profile import Decisions, ModelSpec
from trimvlm.rules import reads
from trimvlm.schedule import Row, resolve


def first_change(decisions: Decisions, spec: ModelSpec) -> int:
    """The first layer that must be run under `decisions`: those before it are as in the dense model.

    The last layer where nothing differs. A selection that ranks by the layer before needs that layer too.
    """
    if decisions.encoder is not None:
        return 0
    for row in resolve(decisions, spec).rows:
        if row != Row(layer=row.layer, live=spec.visual_tokens, after=spec.visual_tokens):
            before = row.select is not None and reads(row.select.by) == "previous"
            return row.layer - before
    return spec.layers - 1


def pays_off(starts: Sequence[int], layers: int, *, dense_known: bool) -> bool:
    """Whether the dense model and candidates from layers `starts` on run fewer layers than whole candidates.

    Args:
        layers: L.
        dense_known: the dense model's prediction is known and need not be run for itself.
    """
    reused = layers + sum(layers - start for start in starts)
    return reused < (len(starts) + (not dense_known)) * layers
