"""ONNX Runtime: nothing is built; the graph is loaded and run once, which proves that it runs here."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from trimvlm.backends.providers import check_provider, nodes_on_cpu
from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.errors import UserError
from trimvlm.target import Target
from trimvlm_engines.library import Work, check_version

log = logging.getLogger(__name__)


class OnnxRuntime:
    """See `Library`."""

    writes_plans = False
    options: Mapping[str, Any] = {}

    def __init__(self, target: Target) -> None:
        assert target.provider
        try:
            import onnxruntime
        except ModuleNotFoundError:
            raise UserError(
                f"target {target.name}: onnxruntime is not installed; pip install 'trimvlm[ort]'"
            ) from None
        check_version(target, onnxruntime.__version__, "pip install 'trimvlm[ort]' gets one")
        check_provider(onnxruntime, target.provider)
        self.version = onnxruntime.__version__
        self.provider = target.provider

    def make(self, work: Work) -> dict[str, Any]:
        """Loads the graph and runs it on zeros of the smallest shapes (for a decoder: one decode step).

        Returns:
            The provider, and as `cpu_nodes` how many nodes it leaves to the CPU, by operator.
        """
        assert work.sink is None
        role = "decoder"
        try:
            with open_backend({role: work.graph}, provider=self.provider) as backend:
                left = nodes_on_cpu(backend.sessions[role], self.provider)
                feeds = {
                    name: np.zeros(work.ranges[name].min, port.dtype)
                    for name, port in backend.inputs(role).items()
                }
                backend.run(role, feeds, list(backend.outputs(role)))
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, all derived from this one
            if type(error).__module__.startswith("onnxruntime"):
                raise UserError(f"{work.graph}: onnxruntime {self.version} cannot run it: {error}") from None
            raise
        if left is None:
            return {"provider": self.provider}
        log.warning("%s: %s leaves to the CPU: %s", work.graph, self.provider, left or "nothing")
        return {"provider": self.provider, "cpu_nodes": dict(sorted(left.items()))}
