"""TensorRT-RTX: plans for GeForce cards, built ahead of time, on any x86-64 machine, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimvlm import machine
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import Work, check_version, plan_options
from trimvlm_engines.plan import Attention, Recipe, make_plan
from trimvlm_engines.versions import set_compute_capability


class TensorRtRtx:
    """See `Library`."""

    writes_plans = True

    def __init__(self, target: Target) -> None:
        try:
            import tensorrt_rtx
        except ModuleNotFoundError:
            raise UserError(
                f"target {target.name}: tensorrt_rtx is not installed; pip install 'trimvlm[rtx]' "
                "(x86-64 Linux or Windows)"
            ) from None
        check_version(target, tensorrt_rtx.__version__, "pip install 'trimvlm[rtx]' gets one")
        assert target.compute_capability
        found = machine.compute_capability() if target.plan.stripped else None
        if target.plan.stripped and found != target.compute_capability:
            said = "no GPU" if found is None else f"a GPU of SM {found}"
            raise UserError(
                f"target {target.name}: plan.stripped: tensorrt_rtx {tensorrt_rtx.__version__} strips plans "
                f"only on a machine with the GPU they are for (SM {target.compute_capability}), but this one "
                f"has {said}; leave plan.stripped out, or build there"
            )
        self.version = tensorrt_rtx.__version__
        self.options: Mapping[str, Any] = plan_options(target)
        self._trt: Any = tensorrt_rtx  # its bindings carry no types
        self._target = target

    def make(self, work: Work) -> dict[str, Any]:
        """Builds the plan for the Target's compute capability.

        float32 Attention has no dedicated kernel (1.7.1), so it is decomposed from the start; float16 and
        bfloat16 are decomposed only where the builder finds no kernel (measured: head size 8), and the result
        says which.
        """
        attention: Attention = "fused"
        if work.dtype == "float32" and self._target.lowering == "fused":
            attention = "decomposed"
        recipe = Recipe(attention, self._target.plan, self._configure)
        return make_plan(self._trt, work, recipe, self._target.lowering)

    def _configure(self, config: Any) -> None:
        assert self._target.compute_capability
        if not set_compute_capability(self._trt, config, self._target.compute_capability):
            raise UserError(
                f"target {self._target.name}: compute_capability: tensorrt_rtx {self.version} does not know "
                f"{self._target.compute_capability}; install a newer one"
            )
