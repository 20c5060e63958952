"""Skip mode in the exported decoder: SPIDER's ASL-Skip in stages (`trimvlm.profile.SkipMode`).

Shapes: V live visual rows, R rows in the stream, D width, K rows in skip mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimvlm.profile import SkipMode
from trimvlm.schedule import Row
from trimvlm_export.decoder_scores import choose
from trimvlm_export.decoder_stream import GatheredRows, Stream

SURE = 1e6  # more than any accumulator: a row in skip mode stays in it


@dataclass(frozen=True)
class Skipping:
    """After a stage: accumulator float32 [V], rows int64 [K] in skip mode, ascending, and flags int64 [V]."""

    accumulator: Tensor
    rows: Tensor
    flags: Tensor


def enter(
    row: Row, stream: Stream, before: Skipping | None, *, gained: Tensor, count: int, forced: Tensor
) -> tuple[Stream, Skipping]:
    """A stage at the input of `row`'s layer.

    Args:
        before: the stage before.
        gained: what accumulators grow by, float32 [V].
        count: K.
        forced: int64 [0 or K], input row numbers that replace the ranking; see `choose`.
    """
    accumulator = ranked = gained
    if before is not None:
        accumulator = before.accumulator + gained
        ranked = accumulator + before.flags.float() * SURE
    rows = choose(ranked, count, forced, stream)
    place = torch.arange(stream.visual)
    flags = (rows.unsqueeze(1) == place.unsqueeze(0)).sum(dim=0)
    if stream.fill:  # the filler row is among both, so that neither is ever empty
        flags = flags * stream.of_prompt
    others = (place + flags * stream.visual).int()
    active = torch.topk(others, stream.visual - count + stream.fill, largest=False).values.long()
    text = torch.arange(stream.visual, stream.hidden.shape[0])
    unskipped = GatheredRows(torch.cat((active, text)), f"unskipped at {row.layer}")
    return replace(stream, unskipped=unskipped), Skipping(accumulator, rows, flags)


def gain(mode: SkipMode, stream: Stream, head: Callable[[Tensor], Tensor]) -> Tensor:
    """float32 [V]: ReLU(1 - R) of the visual rows; `head` is the LM head."""
    visual, text = stream.hidden[: stream.visual], stream.hidden[stream.visual :].float()
    terms = []
    if mode.entropy:
        logs = torch.log_softmax(head(visual).float(), dim=1)
        terms.append(scaled(-(logs.exp() * logs).sum(dim=1), stream))
    if mode.correlation:
        rows, mean = visual.float(), text.mean(dim=0)
        lengths = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(mean)
        terms.append(scaled((rows * mean).sum(dim=1) / lengths.clamp(min=1e-12), stream))
    return torch.relu(1.0 - sum(terms[1:], terms[0]))


def scaled(x: Tensor, stream: Stream) -> Tensor:
    """To 0..1 by the least and greatest of x [V]; zeros where they are equal."""
    limit = torch.full((1,), torch.finfo(torch.float32).max)
    # The limits stand for the extremes of no rows, at decode.
    if stream.fill:
        low, high = (torch.where(stream.of_prompt, x, end) for end in (limit, -limit))
    else:
        low, high = torch.cat((x, limit)), torch.cat((x, -limit))
    least, range_ = low.amin(dim=0), high.amax(dim=0) - low.amin(dim=0)
    found = (x - least) / range_.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(stream.of_prompt, found, 0.0) if stream.fill else found
