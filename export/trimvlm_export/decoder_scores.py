"""How the exported decoder ranks visual rows: each selection rule's score, and the choice of the best.

All scores are float32. At decode there are no visual rows and every score is empty; in a filled decoder
(`trimvlm.filling`) the first score is that of the filler row, and means nothing.

Shapes: N visual rows of the input, T text rows, V visual rows that are ranked, P past rows, R rows in the
stream, S = P + R keys, H heads, G key/value heads, C head size, K kept rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trimvlm.rules import LastRowAttention, SelectionRule, TextAttention, ValueInfluence
from trimvlm_export.decoder_attention import Attended
from trimvlm_export.decoder_stream import Stream, TextRows
from trimvlm_export.operators import attention_weights, repeat_heads, top


def by_previous_layer(rule: SelectionRule, before: Attended, raters: Tensor | None) -> Tensor:
    """[V]: score of the rows whose keys the layer before has, from its attention.

    Args:
        raters: float32 [T], see `raters_of`; for `text_attention`.
    """
    if isinstance(rule, TextAttention):
        assert raters is not None
        return text_attention(before, raters)
    last = before.queries[:, :, -1:]
    # All live rows are before the last one, and the Schedule refuses to rank by a layer whose `text_keys`
    # hides: only a threshold takes keys from its view.
    weights = last_row_weights(last, before.keys, before.shown())
    if isinstance(rule, ValueInfluence):
        return value_influence(weights, before)
    assert isinstance(rule, LastRowAttention)
    return visual_columns(weights.mean(dim=1).reshape(-1), before.past, before.stream.visual)


def last_row_weights(query: Tensor, keys: Tensor, shown: Tensor | None) -> Tensor:
    """query [1, H, 1, C], keys [1, G, S, C], shown bool [S] -> [1, H, 1, S]."""
    return attention_weights(query, keys, None if shown is None else shown.unsqueeze(0))


def visual_columns(of_keys: Tensor, past: int, visual: int) -> Tensor:
    """[S] -> [V]: visual rows come after the past and before the text."""
    return of_keys[past : past + visual]


def text_attention(before: Attended, raters: Tensor) -> Tensor:
    """SparseVLM: mean over heads, summed over raters (text rows, all after the last visual row)."""
    text = TextRows(before.stream.visual)
    queries = before.queries[:, :, before.queries.shape[2] - raters.shape[0] :]
    weights = attention_weights(queries, before.keys, before.visible(text)).mean(dim=1)
    received = raters.reshape(1, 1, -1) @ weights
    return visual_columns(received.reshape(-1), before.past, before.stream.visual)


def raters_of(
    visual: Tensor, text: Tensor, visual_positions: Tensor, text_positions: Tensor, *, fill: int
) -> Tensor:
    """float32 [T], 1 for text rows that rate: `trimvlm.rules.TextAttention`.

    Args:
        visual: [N, D], as injected.
        text: [T, D], embeddings.
        fill: visual filler rows, which are first, and after every text row.
    """
    after = (visual_positions.unsqueeze(0) > text_positions.unsqueeze(1)).sum(dim=1) == fill
    logits = (visual.float() @ text.float().T).masked_fill(~after, torch.finfo(torch.float32).min)
    # Sums over visual rows instead of means: the same order, and no division by zero rows at decode.
    shares = torch.softmax(logits, dim=1)
    if fill:
        shares = shares * (torch.arange(shares.shape[0]) >= fill).unsqueeze(1)
    relevance = shares.sum(dim=0) * after
    mean = relevance.sum() / after.float().sum().clamp(min=1.0)
    return ((relevance >= mean) & after).float()


def value_influence(weights: Tensor, before: Attended) -> Tensor:
    """VisiPruner: |concat over heads of w_h v_h| of each visual row, without making the vectors."""
    past, visual = before.past, before.stream.visual
    values = before.values[:, :, past : past + visual].float()
    squares = repeat_heads((values * values).sum(dim=3, keepdim=True), weights.shape[1])
    mine = weights[:, :, 0, past : past + visual]
    return (mine * mine * squares[..., 0]).sum(dim=1).sqrt().reshape(-1)


def cross_and_self_attention(weights: Tensor, past: int, stream: Stream) -> Tensor:
    """FitPrune: weights [1, H, R, S] of all rows -> [V]."""
    visual = stream.visual
    most = weights.amax(dim=1)[0, :, past : past + visual]
    own = most[:visual] * stream.of_prompt.unsqueeze(1) if stream.fill else most[:visual]
    return most[visual:].sum(dim=0) * own.sum(dim=0)


def random_order(seed: int, visual_tokens: int, stream: Stream) -> Tensor:
    """Each row's place in a permutation of one image's visual rows; the same for every image."""
    places = np.random.default_rng(seed).permutation(visual_tokens)
    number = stream.index + (visual_tokens - stream.fill) if stream.fill else stream.index
    return torch.tensor(places.tolist(), dtype=torch.float32).index_select(0, number % visual_tokens)


def choose(scores: Tensor, count: int, forced: Tensor, stream: Stream) -> Tensor:
    """Row numbers [count] of the best scores [V], ascending; ties go to the lower number.

    Args:
        count: in a filled decoder one more than there are rows to choose: the filler row stays.
        forced: int64 [0 or count], input row numbers that replace the ranking; in a filled decoder [1 or
            count], the first of them that row's.
        stream: of the ranked rows.
    """
    if stream.fill:  # comes last in the ranking, and first in what is given
        scores = torch.where(stream.of_prompt, scores, torch.finfo(torch.float32).min)
    best = top(scores, count)
    given = (stream.index.unsqueeze(0) < forced.unsqueeze(1)).sum(dim=1)
    # Parity feeds all `count` rows in `forced`; otherwise it has none and the ranking decides.
    chosen = torch.cat((given, best))[:count].int()
    return torch.topk(chosen, count, largest=False).values.long()
