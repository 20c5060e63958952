"""Classic TensorRT: plans for Jetson and data-centre GPUs, built on the very device that runs them.

Not yet run: no such device was at hand. What it shares with TensorRT-RTX (`plan.py`) is run there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trimvlm import machine
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import Work, check_version, plan_options
from trimvlm_engines.plan import Recipe, make_plan
from trimvlm_engines.timing_cache import TimingCache, cache_path

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
        self.options: Mapping[str, Any] = plan_options(target)
        self._trt: Any = tensorrt  # absent where the type checker runs
        self._target = target

    def make(self, work: Work) -> dict[str, Any]:
        """Builds the plan; kernels are timed on this GPU, and the times kept for the next build."""
        recipe = Recipe("fused", self._target.plan, self._configure)
        return make_plan(self._trt, work, recipe, self._target.lowering)

    def _configure(self, config: Any) -> Callable[[], None]:
        assert self._target.compute_capability
        times = TimingCache(config, cache_path(self.version, self._target.compute_capability))
        times.load()
        return times.save
