"""The decoder's workload at one point: who runs it, and what each contender's figures say."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from trimvlm.accounting import kv_bytes_per_layer, mac2, selection_flops
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_tools.bench.groups import Grouped
from trimvlm_tools.bench.harness import Resident, Spread
from trimvlm_tools.bench.peaks import Peaks
from trimvlm_tools.bench.prompt_rows import Point
from trimvlm_tools.bench.roofline import Work, decode_work, prefill_work, weight_values

SAME = 1e-3  # largest difference of float32 logits, over the largest one, of two programs of one model


class Flops(Value, frozen=True, kw_only=True):
    """What a prefill costs, 2 per multiply-accumulate.

    Attributes:
        layers: the decoder layers, as the papers count (MAC2).
        selection: scoring rows, which the papers leave out.
        lm_head: the LM head of the one row whose logits are wanted.
    """

    layers: int
    selection: int
    lm_head: int

    @property
    def total(self) -> int:
        """All that the graph computes in matrix products."""
        return self.layers + self.selection + self.lm_head


class Agreement(Value, frozen=True, kw_only=True):
    """A peer's tokens and logits beside our dense decoder's.

    Attributes:
        tokens: greedy tokens that are the same before the first that differs.
        of: how many were generated.
        logits: largest difference of the first token's, over the largest logit; None: the peer gives none.
    """

    tokens: int
    of: int
    logits: float | None

    @property
    def same(self) -> bool:
        """The same function, as far as float32 can tell."""
        return self.tokens > 0 and (self.logits is None or self.logits <= SAME)


class Split(Value, frozen=True, kw_only=True):
    """Seconds in graphs and outside them: until the first token, and of all further tokens together."""

    first_graph: Spread
    first_host: Spread
    decode_graph: Spread | None = None
    decode_host: Spread | None = None


class Reached(Value, frozen=True, kw_only=True):
    """Work and speed of one kind of run.

    Attributes:
        seconds: median.
        roofline_seconds: the least that the measured peaks allow; None where there are no peaks.
    """

    flops: int
    bytes: float
    seconds: float
    roofline_seconds: float | None

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds


class DecoderBytes(Value, frozen=True, kw_only=True):
    """Bytes of one of our decoders.

    Attributes:
        weights: one copy of the matrices that a decode step reads.
        kv, kv_predicted: keys and values after prefill, as held and as the Schedule has them.
        activations: the most private memory while it ran beyond what was there before it and the `kv`; None
            where memory cannot be read.
    """

    weights: int
    kv: int
    kv_predicted: int
    activations: int | None


class DecoderFigures(Value, frozen=True, kw_only=True):
    """One contender at one point. Ratios are to our dense decoder, round by round.

    Attributes:
        prefill, decode: seconds to the first token, and of all further ones; None: only one was asked for.
        prefill_ratio, decode_ratio: to dense.
        cpu_ratio: processor time to dense; with one thread it holds on a busy machine as well.
        tokens_per_second: while decoding.
        prefill_reached, decode_reached: work by the Schedule (dense for a peer), and how fast it was done.
        flops: of a prefill; None for a peer.
        flops_ratio, over_flops: to dense, and the prefill's time ratio over that.
        roofline_ratio, over_roofline: the same with the least seconds that the measured peaks allow; None
            where there are no peaks.
        over_in_turn: the same where a layer takes the sum of its times to read and to multiply, not the
            longer.
    """

    name: str
    kind: Literal["own", "peer"]
    seconds: Spread
    prefill: Spread
    prefill_ratio: Spread
    decode: Spread | None
    decode_ratio: Spread | None
    cpu_ratio: Spread
    tokens_per_second: float | None
    cores: float
    open_seconds: float
    memory: Resident | None
    prefill_reached: Reached
    decode_reached: Reached | None
    split: Split | None = None
    bytes: DecoderBytes | None = None
    flops: Flops | None = None
    flops_ratio: float | None = None
    over_flops: float | None = None
    roofline_ratio: float | None = None
    over_roofline: float | None = None
    over_in_turn: float | None = None
    agreement: Agreement | None = None


def prefill_flops(schedule: Schedule, text: int) -> Flops:
    """Of one image and `text` text rows."""
    return Flops(
        layers=mac2(schedule, text),
        selection=selection_flops(schedule, text),
        lm_head=2 * schedule.model.hidden * schedule.model.vocab,
    )


def own_figures(
    result: Grouped,
    name: str,
    schedule: Schedule,
    dense: Schedule,
    point: Point,
    *,
    value_bytes: float,
    peaks: Peaks | None,
) -> DecoderFigures:
    """Figures of one of our decoders.

    Args:
        value_bytes: of one value of a weight matrix.
    """
    plain = _figures(result, name, schedule, point, value_bytes=value_bytes, peaks=peaks)
    flops = prefill_flops(schedule, point.text)
    flops_ratio = flops.total / prefill_flops(dense, point.text).total
    work, dense_work = (prefill_work(each, point.text, value_bytes) for each in (schedule, dense))
    roofline_ratio = work.seconds(peaks) / dense_work.seconds(peaks) if peaks else None
    ratio = plain["prefill_ratio"].median
    in_turn = work.seconds_in_turn(peaks) / dense_work.seconds_in_turn(peaks) if peaks else None
    figures = result.figures(name)
    kv, memory = int(figures["kv_bytes"][-1]), plain["memory"]
    activations = memory.used.anonymous_peak - memory.opened.anonymous - kv if memory else None
    return DecoderFigures(
        name=name,
        kind="own",
        **plain,
        split=Split(
            **{part: Spread.of(figures[part]) for part in Split.__struct_fields__ if part in figures}
        ),
        bytes=DecoderBytes(
            weights=round(value_bytes * weight_values(schedule)),
            kv=kv,
            kv_predicted=sum(kv_bytes_per_layer(schedule, point.text, 4)),
            activations=activations,
        ),
        flops=flops,
        flops_ratio=flops_ratio,
        over_flops=ratio / flops_ratio,
        roofline_ratio=roofline_ratio,
        over_roofline=ratio / roofline_ratio if roofline_ratio else None,
        over_in_turn=ratio / in_turn if in_turn else None,
    )


def peer_figures(
    result: Grouped,
    name: str,
    dense: Schedule,
    point: Point,
    *,
    value_bytes: float,
    peaks: Peaks | None,
    agreement: Agreement,
) -> DecoderFigures:
    """Figures of a peer, which does the dense decoder's work."""
    plain = _figures(result, name, dense, point, value_bytes=value_bytes, peaks=peaks)
    return DecoderFigures(name=name, kind="peer", **plain, agreement=agreement)


def agreement(ours: Path, theirs: Path) -> Agreement:
    """Compares what two contenders saved."""
    with np.load(ours) as mine, np.load(theirs) as its:
        tokens, others = mine["tokens"], its["tokens"]
        differ = np.flatnonzero(tokens[: len(others)] != others[: len(tokens)])
        logits = None
        if "logits" in its.files:
            a_V, b_V = mine["logits"].reshape(-1), its["logits"].reshape(-1)
            width = min(len(a_V), len(b_V))  # some pad the vocabulary
            logits = float(np.abs(a_V[:width] - b_V[:width]).max() / np.abs(a_V).max())
    same = int(differ[0]) if len(differ) else min(len(tokens), len(others))
    return Agreement(tokens=same, of=len(tokens), logits=logits)


def _figures(
    result: Grouped,
    name: str,
    schedule: Schedule,
    point: Point,
    *,
    value_bytes: float,
    peaks: Peaks | None,
) -> dict:
    """What every contender has."""
    steps = point.new_tokens - 1
    prefill = result.spread(name, "prefill")
    decode = result.spread(name, "decode") if steps else None
    first = prefill_work(schedule, point.text, value_bytes)
    rest = decode_work(schedule, point.text, steps, value_bytes)
    figures = result.figures(name)
    return {
        "seconds": result.spread(name),
        "prefill": prefill,
        "prefill_ratio": result.ratio(name, "prefill"),
        "decode": decode,
        "decode_ratio": result.ratio(name, "decode") if steps else None,
        "cpu_ratio": result.ratio(name, "cpu_seconds"),
        "tokens_per_second": steps / decode.median if decode else None,
        "cores": float(np.median(np.divide(figures["cpu_seconds"], figures["seconds"]))),
        "open_seconds": result.open_seconds(name),
        "memory": result.memory(name),
        "prefill_reached": _reached(first, prefill.median, peaks),
        "decode_reached": _reached(rest, decode.median, peaks) if decode else None,
    }


def _reached(work: Work, seconds: float, peaks: Peaks | None) -> Reached:
    return Reached(
        flops=sum(work.flops),
        bytes=sum(work.bytes),
        seconds=seconds,
        roofline_seconds=work.seconds(peaks) if peaks else None,
    )
