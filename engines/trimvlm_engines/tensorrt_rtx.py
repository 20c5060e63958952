"""TensorRT-RTX: plans for GeForce cards, built ahead of time, on any x86-64 machine, without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimvlm.bundle import Dtype
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import check_version
from trimvlm_engines.plan import Attention, NoFusedAttentionError, Sink, build_plan
from trimvlm_engines.shapes import ShapeRange

log = logging.getLogger(__name__)


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
        self.version = tensorrt_rtx.__version__
        self.options: Mapping[str, Any] = {"compute_capability": target.compute_capability, "tf32": False}
        self._trt: Any = tensorrt_rtx  # its bindings carry no types
        self._target = target

    def make(
        self, graph: Path, ranges: Mapping[str, ShapeRange], dtype: Dtype, sink: Sink | None
    ) -> dict[str, Any]:
        """Builds the plan for the Target's compute capability.

        float32 Attention has no dedicated kernel (1.7.1), so it is decomposed from the start; float16 and
        bfloat16 are decomposed only where the builder finds no kernel (measured: head size 8), and the result
        says which.
        """
        assert sink is not None
        if self._target.lowering == "primitive":
            self._build(graph, ranges, sink, "fused")
            return {"attention": "primitive"}
        attention: Attention = "decomposed" if dtype == "float32" else "fused"
        try:
            self._build(graph, ranges, sink, attention)
        except NoFusedAttentionError:
            attention = "decomposed"
            log.warning("%s: no fused attention kernel for this head size; decomposed", graph.name)
            self._build(graph, ranges, sink, attention)
        return {"attention": attention}

    def _build(self, graph: Path, ranges: Mapping[str, ShapeRange], sink: Sink, attention: Attention) -> None:
        build_plan(self._trt, graph, ranges, sink, attention=attention, configure=self._configure)

    def _configure(self, config: Any) -> None:
        # No timing cache: it does nothing here and makes the builder ask for a GPU.
        assert self._target.compute_capability
        capability = getattr(
            self._trt.ComputeCapability, "SM" + self._target.compute_capability.replace(".", ""), None
        )
        if capability is None:
            raise UserError(
                f"target {self._target.name}: compute_capability: tensorrt_rtx {self.version} does not know "
                f"{self._target.compute_capability}; install a newer one"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(capability, 0)
