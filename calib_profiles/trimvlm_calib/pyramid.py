"""HiDivDrop's pyramids: how many visual tokens each filter layer keeps, published or for a mean budget.

Concave, as the paper uses the word: tokens go rapidly at the first filters and then ever more slowly; after
the first filter, none drops more than the one before it. All published schedules are so (the first drop of
Tok80 is smaller than its second), and they share their end: 10, 5 and 1 of 576 tokens.

Symbols: N visual tokens, L layers, k_1 >= k_2 >= ... >= k_m what the m filters keep.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from trimvlm.errors import UserError
from trimvlm.value import Value

END = (10 / 576, 5 / 576, 1 / 576)  # what the last filters keep in every published schedule


class Published(Value, frozen=True, kw_only=True):
    """A schedule of the official training scripts, for 32 layers and 576 tokens; layers 0-based.

    The paper gives filters 10, 14, 16, 18 for all of them; the script for 80 tokens has others.
    """

    filters: tuple[int, ...] = (10, 14, 16, 18)
    keep: tuple[int, ...]
    inject: int = 8
    exit: int = 24
    layers: int = 32
    tokens: int = 576


PUBLISHED = {
    "tok48": Published(keep=(87, 10, 5, 1)),
    "tok64": Published(keep=(215, 10, 5, 1)),
    "tok80": Published(filters=(10, 13, 16, 19), keep=(453, 10, 5, 1)),
}


def concave_pyramid(
    mean: float, *, tokens: int, layers: int, inject: int, exit_: int, filters: Sequence[int]
) -> list[int]:
    """Budgets of a concave pyramid with `mean` live visual tokens over all layers.

    The last filters keep what the published schedules keep, and the first what gives the mean. Where that is
    not concave (small means), the whole pyramid shrinks; where the first filter would have to keep more than
    there is (large means), the others keep more.

    Args:
        mean: tokens, mean over all L layers.
        tokens: N.
        layers: L.
        inject, exit_: first layer with visual tokens, first without.
        filters: rising layer numbers within `inject` .. `exit_ - 1`, at least one.

    Returns:
        One budget per filter, falling, from 1 to N; their mean is within half a token of `mean`.

    Raises:
        UserError: no pyramid over these layers has this mean; the message gives the range.
    """
    before = tokens * (filters[0] - inject)
    spans = [later - layer for layer, later in zip(filters, [*filters[1:], exit_], strict=True)]
    least, most = before + sum(spans), before + tokens * sum(spans)
    total = mean * layers
    if not least <= total <= most:
        raise UserError(
            f"mean: {mean:.4g} tokens cannot be reached with injection at layer {inject}, filters at "
            f"{list(filters)} and exit at layer {exit_}: {least / layers:.4g} to {most / layers:.4g} can"
        )
    end = _end(len(filters) - 1, tokens)
    drops = [a - b for a, b in itertools.pairwise(end)]
    wanted = total - before
    # Real-valued first: `steep` is the smallest first budget that is concave above the published end.
    steep = [end[0] + (drops[0] if drops else 0), *end] if end else [1]
    steep[0] = min(steep[0], tokens)
    if wanted <= _rows(steep, spans):
        share = (wanted - sum(spans)) / max(_rows(steep, spans) - sum(spans), 1)
        kept = _stack(1, [int(share * (a - b)) for a, b in zip(steep, [*steep[1:], 1], strict=True)])
    elif wanted <= _rows([tokens, *end], spans):
        kept = steep
    else:
        share = (tokens * sum(spans) - wanted) / (tokens * sum(spans) - _rows([tokens, *end], spans))
        kept = _from_top(tokens, [int(share * drop) for drop in drops], spans, wanted)
    # What rounding left over goes to the first filter, which may not drop less than the second.
    first = kept[0] + round((wanted - _rows(kept, spans)) / spans[0])
    floor = 2 * kept[1] - kept[2] if len(kept) > 2 else kept[-1]
    if len(kept) > 1:
        first = max(first, floor)
    return [min(tokens, first), *kept[1:]]


def _from_top(tokens: int, drops: Sequence[int], spans: Sequence[int], wanted: float) -> list[int]:
    """Budgets whose first is `tokens` and whose drops after the second are `drops`."""
    below = [0]  # how far each budget lies below the second
    for drop in drops:
        below.append(below[-1] + drop)
    inner = sum(depth * span for depth, span in zip(below, spans[1:], strict=True))
    first = round((tokens * sum(spans) - wanted - inner) / sum(spans[1:]))
    return [tokens, *(tokens - first - depth for depth in below)]


def _stack(last: int, drops: Sequence[int]) -> list[int]:
    """Budgets from their drops; `drops[-1]` is what the last one exceeds `last` by."""
    kept = [last]
    for drop in reversed(drops):
        kept.insert(0, kept[0] + drop)
    return kept[:-1]


def _rows(kept: Sequence[int], spans: Sequence[int]) -> int:
    return sum(keep * span for keep, span in zip(kept, spans, strict=True))


def _end(count: int, tokens: int) -> list[int]:
    """What the last `count` filters keep: the published end, doubled upwards where there are more filters."""
    shares = list(END)
    while len(shares) < count:
        shares.insert(0, 2 * shares[0])
    return [min(tokens, max(1, round(share * tokens))) for share in shares[len(shares) - count :]]
