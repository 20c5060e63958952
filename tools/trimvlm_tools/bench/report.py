"""What `trimvlm bench` says: the figures of a run with the machine they come from, and its bars."""

from __future__ import annotations

from trimvlm.value import Value
from trimvlm_tools.bench.geometry import Geometry
from trimvlm_tools.bench.machine import Machine
from trimvlm_tools.bench.memory import SessionMemory
from trimvlm_tools.bench.prefill import AgainstPeer, Contest
from trimvlm_tools.bench.size import Size
from trimvlm_tools.bench.stages import Steps
from trimvlm_tools.console import table

OVERHEAD, PEER_TIME, RESIDENT, DISK = 1.10, 1.05, 1.3, 1.02  # at most
QUIET = 0.1  # processors that other work may keep busy before the report warns


class Bar(Value, frozen=True, kw_only=True):
    """One figure against what is asked of it; `measured` None: not measured, which is not a pass."""

    what: str
    measured: float | None
    at_most: float

    @property
    def verdict(self) -> str:
        """For people."""
        if self.measured is None:
            return "not measured"
        return "pass" if self.measured <= self.at_most else "MISSED"


class Report(Value, frozen=True, kw_only=True):
    """One run of `trimvlm bench`.

    Attributes:
        others_busy: processors that other processes kept busy meanwhile, on average; None: unknown.
        failed: contenders that failed, with their error.
    """

    machine: Machine
    threads: int
    runs: int
    others_busy: float | None
    failed: dict[str, str]
    geometry: Geometry | None = None
    bundle: str | None = None
    target: str | None = None
    prefill: tuple[Contest, ...] = ()
    against: AgainstPeer | None = None
    steps: tuple[Steps, ...] = ()
    memory: dict[str, SessionMemory] = {}
    size: Size | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def good(self) -> bool:
        """Nothing failed and no bar was missed."""
        return not self.failed and all(bar.verdict != "MISSED" for bar in self.bars)


def geometry_bars(
    prefill: tuple[Contest, ...], against: AgainstPeer | None, memory: SessionMemory, size: Size
) -> tuple[Bar, ...]:
    """The bars of a geometry's figures."""
    bars = [
        Bar(what=f"{contest.method}: time ratio / FLOPs ratio", measured=contest.overhead, at_most=OVERHEAD)
        for contest in prefill
        if contest.method != "dense"
    ]
    peer_time = against.time_ratio.median if against else None
    bars.append(Bar(what="dense: time / transformers' exporter", measured=peer_time, at_most=PEER_TIME))
    bars.append(
        Bar(what="session: peak memory / weights", measured=memory.peak_over_weights, at_most=RESIDENT)
    )
    bars.append(Bar(what="bundle / checkpoint, on disk", measured=size.over_checkpoint, at_most=DISK))
    return tuple(bars)


def as_text(report: Report) -> str:
    """The report for people."""
    parts = [_machine(report)]
    if report.prefill:
        parts.append(_prefill(report.prefill))
    if report.against:
        parts.append(_against(report.against))
    if report.steps:
        parts.append(_steps(report.steps))
    parts.extend(_memory(name, memory) for name, memory in report.memory.items())
    if report.size:
        parts.append(_size(report.size))
    if report.bars:
        rows = [(bar.what, bar.measured, bar.at_most, bar.verdict) for bar in report.bars]
        parts.append(table(("bar", "measured", "at most", "verdict"), rows))
    parts.extend(f"{name} FAILED: {error}" for name, error in report.failed.items())
    return "\n\n".join(parts)


def _machine(report: Report) -> str:
    machine = report.machine
    warning = ""
    if report.others_busy is not None and report.others_busy > QUIET:
        warning = "\nNOT QUIET: other work took part of the processors; do not rely on these times"
    load = f"{machine.load[0]:.2f}" if machine.load else "unknown"
    others = "unknown" if report.others_busy is None else f"{report.others_busy:.2f} processors"
    memory = "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.0f} GiB"
    return (
        f"{machine.cpu or 'unknown processor'}, {machine.cores} cores, "
        f"governor {machine.governor or 'unknown'}, {memory}; "
        f"onnxruntime {machine.versions.get('onnxruntime', 'none')}\n"
        f"{report.threads} threads, {report.runs} counted rounds; load before {load}, "
        f"busy with other work {others}{warning}"
    )


def _prefill(contests: tuple[Contest, ...]) -> str:
    rows = [
        (
            c.method,
            *(round(1000 * x, 1) for x in (c.seconds.median, c.seconds.min, c.seconds.max)),
            c.flops.total / 1e9,
            round(c.flops_ratio, 4),
            round(c.time_ratio.median, 4),
            round(c.overhead, 3),
            round(c.cores, 2),
        )
        for c in contests
    ]
    header = ("prefill", "ms", "min", "max", "GFLOP", "of dense", "time of dense", "time/FLOPs", "cores")
    return table(header, rows)


def _against(against: AgainstPeer) -> str:
    seconds, ratio = against.seconds, against.time_ratio
    return (
        f"peer: {against.peer}: {1000 * seconds.median:.1f} ms ({1000 * seconds.min:.1f} to "
        f"{1000 * seconds.max:.1f}); dense takes {ratio.median:.3f} of its time ({ratio.min:.3f} to "
        f"{ratio.max:.3f}); logits differ by {against.largest_difference:.1e} of the largest"
    )


def _steps(steps: tuple[Steps, ...]) -> str:
    def ms(spread) -> float | None:
        return None if spread is None else round(1000 * spread.median, 1)

    rows = [
        (
            s.profile,
            ms(s.preprocess),
            ms(s.vision),
            ms(s.select),
            ms(s.prefill),
            ms(s.first_token),
            None if s.tokens_per_second is None else round(s.tokens_per_second.median, 1),
            s.decode_tokens,
        )
        for s in steps
    ]
    header = ("profile", "preprocess ms", "vision", "select", "prefill", "first token", "tokens/s", "decoded")
    return table(header, rows)


def _memory(name: str, memory: SessionMemory) -> str:
    rows = [
        (state, *(round(x / 1e6, 1) for x in (m.peak, m.anonymous_peak, m.anonymous, m.file)))
        for state, m in (
            ("empty Python", memory.empty),
            ("+ imports", memory.imports),
            ("+ open session", memory.opened),
            ("+ prefill, decode", memory.used),
            ("the same, low_memory", memory.low_memory),
        )
    ]
    header = (f"memory of {name}, MB", "peak", "peak private", "private", "file-backed")
    return (
        f"{table(header, rows)}\nweights {memory.weight_bytes / 1e6:.1f} MB; rows after the first are above "
        f"the empty process; peak {memory.peak_over_weights:.3f} of the weights"
    )


def _size(size: Size) -> str:
    return (
        f"bundle {size.bundle / 1e6:.1f} MB with {size.profiles} profiles, {size.over_checkpoint:.4f} of the "
        f"checkpoint; a profile adds {size.per_profile / 1e6:.2f} MB"
    )
