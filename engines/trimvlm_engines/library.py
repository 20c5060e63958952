"""What `build` asks of a library that runs graphs or plans; one module each implements it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trimvlm.bundle import Dtype
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.plan import Sink
from trimvlm_engines.shapes import ShapeRange


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

    def make(
        self, graph: Path, ranges: Mapping[str, ShapeRange], dtype: Dtype, sink: Sink | None
    ) -> dict[str, Any]:
        """Builds the plan of one graph into `sink`, or proves that the graph runs as it is.

        Returns:
            What was decided on the way, for the Engine's options.

        Raises:
            UserError: the library refuses the graph; the message says why.
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
