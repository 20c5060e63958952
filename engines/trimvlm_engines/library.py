"""What `build` asks of a library that runs graphs or plans; one module each implements it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from trimvlm.bundle import Dtype
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.progress import Progress, Watch
from trimvlm_engines.shapes import ShapeRange


class Sink(Protocol):
    """Where a plan goes."""

    def write(self, data: bytes | memoryview) -> int: ...


def unwatched(progress: Progress) -> None:
    """Watches nothing."""


class Work(NamedTuple):
    """What a library is to make.

    Attributes:
        graph: ONNX file; its external data is read from beside it.
        ranges: shape range of every input with a dynamic dimension.
        dtype: precision of the graph.
        phases: ranges of prefill and of decode, where each gets an optimisation profile of its own, in this
            order; empty: one for `ranges`.
        sink: takes the plan; None where there is none.
        watch: told how far the library is; does not matter to the result.
    """

    graph: Path
    ranges: Mapping[str, ShapeRange]
    dtype: Dtype
    phases: Sequence[Mapping[str, ShapeRange]] = ()
    sink: Sink | None = None
    watch: Watch = unwatched


class Library(Protocol):
    """An installed library, checked against a Target.

    Attributes:
        version: exact version, e.g. `1.7.1.116`.
        options: what decides the result besides graph and shapes; a change makes engines stale.
        writes_plans: False where the graph itself is what runs.
    """

    version: str
    options: Mapping[str, Any]
    writes_plans: bool

    def make(self, work: Work) -> dict[str, Any]:
        """Builds the plan of one graph into its sink, or proves that the graph runs as it is.

        Returns:
            What was decided on the way, for the Engine's options.

        Raises:
            UserError: the library refuses the graph; the message says why.
            KeyboardInterrupt: Ctrl-C; no sooner than the library has let go.
        """
        ...


def open_library(target: Target) -> Library:
    """The library of a Target.

    Raises:
        UserError: not installed, of a version the Target does not allow, or not usable on this machine.
    """
    if target.backend == "onnxruntime":
        from trimvlm_engines.onnx_runtime import OnnxRuntime

        return OnnxRuntime(target)
    if target.backend == "tensorrt_rtx":
        from trimvlm_engines.tensorrt_rtx import TensorRtRtx

        return TensorRtRtx(target)
    from trimvlm_engines.tensorrt_classic import TensorRt

    return TensorRt(target)


def check_version(target: Target, version: str, install: str) -> None:
    """Refuses a version outside the Target's range; `install` says how to get another one.

    Raises:
        UserError: naming both.
    """
    if not target.allows(version):
        raise UserError(
            f"target {target.name}: {target.backend} {version} is installed, but it takes {target.versions}; "
            f"{install}"
        )


def plan_options(target: Target) -> dict[str, Any]:
    """What decides a plan besides graph and shapes, for `Library.options`."""
    return {
        "compute_capability": target.compute_capability,
        "tf32": False,
        "version_compatible": target.plan.version_compatible,
        "stripped": target.plan.stripped,
    }
