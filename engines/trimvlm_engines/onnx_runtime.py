"""ONNX Runtime: nothing is built; the graph is loaded and run once, which proves that it runs here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import Work, check_version

CPU = "CPUExecutionProvider"
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


class OnnxRuntime:
    """See `Library`."""

    writes_plans = False
    options: Mapping[str, Any] = {}

    def __init__(self, target: Target) -> None:
        if target.provider != CPU:  # run_onnxruntime would use the CPU without a word
            raise UserError(
                f"target {target.name}: this version of trimvlm runs ONNX Runtime on the CPU only, not "
                f"through {target.provider}; use ort-cpu"
            )
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise UserError(
                f"target {target.name}: onnxruntime is not installed; pip install 'trimvlm[ort]'"
            ) from None
        check_version(target, onnxruntime.__version__, "pip install 'trimvlm[ort]' gets one")
        self.version = onnxruntime.__version__
        self._ort = onnxruntime

    def make(self, work: Work) -> dict[str, Any]:
        """Loads the graph and runs it on zeros of the smallest shapes (for a decoder: one decode step)."""
        assert work.sink is None
        try:
            session = self._ort.InferenceSession(str(work.graph), providers=[CPU])
            feeds = {
                node.name: np.zeros(work.ranges[node.name].min, NUMPY[node.type])
                for node in session.get_inputs()
            }
            session.run(None, feeds)
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, all derived from this one
            if type(error).__module__.startswith("onnxruntime"):
                raise UserError(f"{work.graph}: onnxruntime {self.version} cannot run it: {error}") from None
            raise
        return {"provider": CPU}
