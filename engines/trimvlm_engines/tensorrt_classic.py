"""Classic TensorRT: plans for Jetson and data-centre GPUs, built on the very device that runs them.

Not yet run: no such device was at hand. What it shares with TensorRT-RTX (`plan.py`) is run there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimvlm import machine
from trimvlm.bundle import Dtype, write_whole
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import check_version
from trimvlm_engines.plan import Attention, NoFusedAttentionError, Sink, build_plan
from trimvlm_engines.shapes import ShapeRange

INSTALL = (
    "TensorRT comes with JetPack (apt install python3-libnvinfer, a venv with --system-site-packages) "
    "or from NVIDIA's own package index (https://docs.nvidia.com/deeplearning/tensorrt)"
)


class TensorRt:
    """See `Library`."""

    writes_plans = True

    def __init__(self, target: Target) -> None:
        try:
            import tensorrt
        except ModuleNotFoundError:
            raise UserError(
                f"target {target.name}: tensorrt is not installed, and its plans are built on the "
                f"device; {INSTALL}"
            ) from None
        check_version(target, tensorrt.__version__, INSTALL)
        found = machine.compute_capability()
        if found != target.compute_capability:
            said = "no GPU" if found is None else f"a GPU of SM {found}"
            raise UserError(
                f"target {target.name}: its plans are built on the device (SM {target.compute_capability}), "
                f"but this machine has {said}; copy the bundle there"
            )
        self.version = tensorrt.__version__
        self.options: Mapping[str, Any] = {"compute_capability": found, "tf32": False}
        self._trt = tensorrt
        self._target = target

    def make(
        self, graph: Path, ranges: Mapping[str, ShapeRange], dtype: Dtype, sink: Sink | None
    ) -> dict[str, Any]:
        """Builds the plan; kernels are timed on this GPU, and the times kept for the next build."""
        assert sink is not None
        cache = graph.with_name(f".{self._target.name}.{self.version}.timing")

        def configure(config: Any) -> Callable[[], None]:
            return _timing_cache(config, cache)

        if self._target.lowering == "primitive":
            build_plan(self._trt, graph, ranges, sink, attention="fused", configure=configure)
            return {"attention": "primitive"}
        attention: Attention = "fused"
        try:
            build_plan(self._trt, graph, ranges, sink, attention=attention, configure=configure)
        except NoFusedAttentionError:
            attention = "decomposed"
            build_plan(self._trt, graph, ranges, sink, attention=attention, configure=configure)
        return {"attention": attention}


def _timing_cache(config: Any, path: Path) -> Callable[[], None]:
    """Loads the kernel times of earlier builds; returns what saves them."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        # Of another GPU, or damaged: TensorRT says so in its log, and times anew.
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def save() -> None:
        write_whole(path, bytes(config.get_timing_cache().serialize()))

    return save
