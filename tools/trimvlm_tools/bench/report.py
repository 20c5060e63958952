"""The report of `trimvlm bench`: the figures of a run with the machine that they come from, and its bars."""

from __future__ import annotations

from typing import Any

from trimvlm.profile import ModelSpec
from trimvlm.value import Value
from trimvlm_tools.bench.answers import Answers
from trimvlm_tools.bench.bars import Bar
from trimvlm_tools.bench.groups import Samples
from trimvlm_tools.bench.machine import Machine
from trimvlm_tools.bench.points import PointFigures
from trimvlm_tools.bench.session_memory import SessionMemory
from trimvlm_tools.bench.size import Size
from trimvlm_tools.bench.stages import Steps

QUIET = 0.1  # processors that other work may keep busy before the report warns


class PeerTerms(Value, frozen=True, kw_only=True):
    """What a peer was measured with: pip requirements, and its settings as its file gives them."""

    requirements: tuple[str, ...]
    settings: dict[str, str]


class Report(Value, frozen=True, kw_only=True):
    """One run of `trimvlm bench`.

    Attributes:
        runs: counted rounds of each process.
        processes: how often each contender was started.
        others_busy: processors that other processes kept busy meanwhile, on average; None: unknown.
        failed: profiles of a bundle that failed, with their error; points and answers have their own.
        precision: of the weights, with a geometry.
        steps: with a bundle: answers, by profile.
        samples: with a bundle: of each profile, what `steps` are medians of.
    """

    machine: Machine
    threads: int
    runs: int
    processes: int
    others_busy: float | None
    failed: dict[str, str]
    geometry: str | None = None
    model: ModelSpec | None = None
    precision: str | None = None
    peers: dict[str, PeerTerms] = {}
    bundle: str | None = None
    target: str | None = None
    points: tuple[PointFigures, ...] = ()
    answers: Answers | None = None
    steps: tuple[Steps, ...] = ()
    samples: dict[str, tuple[Samples, ...]] = {}
    memory: dict[str, SessionMemory] = {}
    size: Size | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def failures(self) -> dict[str, str]:
        """Everything that failed, by where and who."""
        found = dict(self.failed)
        for each in self.points:
            found |= {f"{each.point.name}, {name}": error for name, error in each.failed.items()}
        if self.answers:
            found |= {f"answer, {name}": error for name, error in self.answers.failed.items()}
        return found

    @property
    def good(self) -> bool:
        """Nothing failed and no bar was missed."""
        return not self.failures and all(bar.verdict != "MISSED" for bar in self.bars)

    @property
    def quiet(self) -> bool:
        """Other work did not take much of the processors, as far as is known."""
        return self.others_busy is None or self.others_busy <= QUIET


def as_data(report: Report) -> Any:
    """Plain data for JSON, with what follows from the figures written out."""
    import msgspec

    data = msgspec.to_builtins(report)
    for point, figures in zip(data["points"], report.points, strict=True):
        for row, each in zip(point["contenders"], figures.contenders, strict=True):
            for kind in ("prefill_reached", "decode_reached"):
                reached = getattr(each, kind)
                if reached:
                    row[kind] |= {
                        "flops_per_second": reached.flops_per_second,
                        "bytes_per_second": reached.bytes_per_second,
                    }
    return data | {"good": report.good, "quiet": report.quiet}
