"""Backends: the libraries that execute graphs or engines, one file each.

The file for a Target's backend `x` is `run_x.py`; it offers `open_backend(files, **options) -> Backend` and
imports its library only there. A backend takes device memory only inside its `with`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trimvlm.errors import UserError

PAST_CACHES, PRESENT_CACHES = "past_caches", "present_caches"


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; a dimension of free length is None."""

    dtype: np.dtype
    shape: tuple[int | None, ...]


class Backend(Protocol):
    """Runs the graphs of one profile by role (`vision`, `decoder`)."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def inputs(self, role: str) -> dict[str, Port]:
        """The graph's inputs by name."""
        ...

    def outputs(self, role: str) -> dict[str, Port]:
        """The graph's outputs by name."""
        ...

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Runs a graph.

        Args:
            role: `vision` or `decoder`.
            feeds: every input: numpy arrays of the port's dtype, or what an earlier run kept.
            fetch: outputs wanted as numpy arrays.
            keep: outputs left where the backend has them, good for nothing but feeding a later run. Caches
                that a backend has together come as one, `PRESENT_CACHES`, and are fed as `PAST_CACHES`.
        """
        ...


def load_backend(name: str, files: Mapping[str, Path], options: Mapping[str, Any]) -> Backend:
    """Makes the backend `name` (a Target's `backend`) for the graphs or plans of one profile.

    Raises:
        UserError: this version has no such backend, it has no such option, or its library is not installed.
    """
    module = f"{__name__}.run_{name}"
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this version of trimvlm cannot run {name} engines; use the target ort-cpu")
    opener = importlib.import_module(module).open_backend
    known = [each for each in inspect.signature(opener).parameters if each != "files"]
    for option in options:
        if option not in known:
            raise UserError(f"{option}: no option of {name}; it has {', '.join(known)}")
    return opener(files, **options)


def check_feeds(ports: Mapping[str, Port], feeds: Mapping[str, NDArray]) -> None:
    """Asserts that arrays fit their ports: a programmer's error otherwise, with the name in it."""
    for name, array in feeds.items():
        assert name in ports, f"{name} is no input of this graph: {sorted(ports)}"
        port = ports[name]
        fits = len(array.shape) == len(port.shape) and all(
            want in (None, have) for want, have in zip(port.shape, array.shape, strict=True)
        )
        assert fits and array.dtype == port.dtype, (
            f"{name}: {array.dtype} {array.shape}, not {port.dtype} {port.shape}"
        )
