"""TensorRT-RTX: plans built ahead of time; kernels are compiled on the card at their first run, and kept.

What it compiled is kept in the user's cache directory, a file per plan. The library itself compares library,
driver and card before it takes one, and a file that it does not take is replaced.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trimvlm.backends.cuda import Cuda
from trimvlm.backends.plan_backend import PlanBackend
from trimvlm.backends.plan_library import PlanLibrary
from trimvlm.files import cache_directory, write_whole

log = logging.getLogger(__name__)

INSTALL = "pip install 'trimvlm[rtx]' (x86-64 Linux or Windows)"


def open_backend(
    files: Mapping[str, Path],
    *,
    graphs: Mapping[str, Path] = MappingProxyType({}),
    turns: bool | None = None,
    cuda_graph: bool = False,
) -> PlanBackend:
    """Makes the backend; device memory is taken by `with`.

    Args:
        files: role to plan.
        graphs: role to the ONNX graph that a plan without weights takes them from.
        turns: whether the decoder's engine and the others take turns in device memory: each is loaded when
            it is needed, and the other dropped. None: where they do not fit together.
        cuda_graph: let the library capture a CUDA graph for each set of shapes. In decoding every step has
            new shapes, so it can only pay where the same lengths come again; not measured.

    Raises:
        UserError: TensorRT-RTX or the bindings of CUDA are missing or too old, or there is no GPU.
    """
    library = RtxLibrary(cuda_graph)
    Cuda()
    return PlanBackend(files, library, graphs, turns)


class RtxLibrary(PlanLibrary):
    """See `PlanLibrary`. Compiled kernels outlive the contexts that compiled them."""

    def __init__(self, cuda_graph: bool) -> None:
        super().__init__("tensorrt_rtx", (1, 4), INSTALL)
        self._cuda_graph = cuda_graph
        self._caches: dict[Path, Any] = {}  # by plan, of the contexts that are alive
        self._kept: dict[Path, str] = {}  # by plan, the hash of what is in its file

    def create_context(self, engine: Any, path: Path) -> Any:
        """A context with what was compiled for the plan before."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if self._cuda_graph:
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if (kept := _read(_cache_file(path, self.version))) and not cache.deserialize(kept):
            log.info("%s: kernels kept for another library, driver or card; compiled anew", path)
        self._kept[path] = hashlib.sha256(kept).hexdigest()
        if config.set_runtime_cache(cache):
            self._caches[path] = cache
        return engine.create_execution_context(runtime_config=config)

    def leave_context(self, context: Any, path: Path) -> None:
        """Keeps what was compiled since; a directory that cannot be written costs the next start its time."""
        cache, file = self._caches.pop(path, None), _cache_file(path, self.version)
        if cache is None or file is None:
            return
        compiled = bytes(memoryview(cache.serialize()))
        if hashlib.sha256(compiled).hexdigest() == self._kept[path]:
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, compiled)
        except OSError as error:
            log.info("%s: compiled kernels are not kept: %s", file, error)


def _cache_file(path: Path, version: str) -> Path | None:
    """Where the kernels of a plan are kept; None where the user has no home."""
    root = cache_directory()
    name = hashlib.sha256(f"{path.resolve()} {version}".encode()).hexdigest()[:32]
    return root.with_name("kernels") / name if root else None


def _read(file: Path | None) -> bytes:
    try:
        return file.read_bytes() if file and file.is_file() else b""
    except OSError as error:
        log.info("%s: %s", file, error)
        return b""
