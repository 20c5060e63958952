"""The machine's own peaks, measured turn by turn with everything else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trimvlm.value import Value
from trimvlm_tools.bench.harness import Contender, Spread, own_contender

if TYPE_CHECKING:
    from trimvlm_tools.bench.groups import Grouped

NAME = "machine"
_SIDE, _BYTES = 2048, 1 << 30


class Peaks(Value, frozen=True, kw_only=True):
    """Medians over the rounds, each the best of a few passes.

    Attributes:
        flops: FLOP/s of a float32 matrix product of 2048 x 2048 matrices.
        read, copy: bytes/s of reading 1 GiB, and of reading and writing it.
        rows: bytes/s of weights in ONNX Runtime's products of one row, large matrices and nothing else.
        by: what reached `flops` and `read`.
        range: least and greatest value of each over the rounds.
    """

    flops: float
    read: float
    copy: float
    rows: float
    by: dict[str, str]
    range: dict[str, tuple[float, float]]


def peaks_contender(work: Path, *, threads: int) -> Contender:
    """The process that measures them."""
    spec = {"threads": threads, "side": _SIDE, "bytes": _BYTES}
    return own_contender(NAME, "peaks_worker", spec, work / f"{NAME}.json")


def read_peaks(result: Grouped) -> Peaks | None:
    """From a race in which it took part; None: it failed."""
    figures = result.figures(NAME)
    if not figures:
        return None
    spreads = {name: Spread.of(values) for name, values in figures.items()}

    def most(kind: str) -> str:
        return max((name for name in spreads if name.startswith(kind)), key=lambda name: spreads[name].median)

    found = {"flops": most("flops_"), "read": most("read_"), "copy": "copy", "rows": "rows_onnxruntime"}
    return Peaks(
        **{kind: spreads[name].median for kind, name in found.items()},
        by={kind: name.partition("_")[2] for kind, name in found.items() if kind in ("flops", "read")},
        range={kind: (spreads[name].min, spreads[name].max) for kind, name in found.items()},
    )
