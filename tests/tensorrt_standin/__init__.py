"""A stand-in for TensorRT, TensorRT-RTX and CUDA, for tests of what runs plans where there is no GPU.

It really computes, through ONNX Runtime on the CPU, and refuses what the real libraries would refuse
(`RefusedError`); `tests/runtime/test_tensorrt_standin.py` shows that each refusal works. It is no proof that
a plan runs on a GPU, and nothing that ran on it counts as run on one.
"""

from __future__ import annotations

import json
import sys
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tensorrt_standin import engine
from tensorrt_standin.cudart import Runtime as Cudart
from tensorrt_standin.device import Device, RefusedError
from tensorrt_standin.plans import MAGIC, StandInLibrary
from trimvlm import machine
from trimvlm_engines import build

__all__ = ["Device", "RefusedError", "StandIn", "StandInLibrary"]

VERSIONS = {"tensorrt": "10.3.0.30", "tensorrt_rtx": "1.7.1.116"}


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity
    initialised = False

    def __init__(self) -> None:
        self.initialised = True

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Runtime:
    """`trt.Runtime`."""

    def __init__(self, standin: StandIn, name: str, logger: ILogger) -> None:
        if not (isinstance(logger, ILogger) and logger.initialised):
            raise TypeError("the logger's __init__ does not call ILogger.__init__")
        self._standin, self._name, self._logger = standin, name, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: Any) -> engine.Engine | None:
        """An engine, or None after the reason has been logged: as the real one."""
        data, standin = bytes(memoryview(plan)), self._standin
        if not data.startswith(MAGIC):
            return self._refuse("Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG failed.")
        found = json.loads(data[len(MAGIC) :].split(b"\n", 1)[0])
        if (found["library"], found["version"]) != (self._name, VERSIONS[self._name]):
            return self._refuse("The engine plan file is not compatible with this version of TensorRT")
        if found["version_compatible"] and not self.engine_host_code_allowed:
            return self._refuse("The engine has host code, which engine_host_code_allowed does not admit")
        if standin.device.used + found["weights"] > standin.device.memory:
            return self._refuse("Error Code 2: OutOfMemory (Requested size was not available)")
        return engine.Engine(
            standin.device,
            found,
            hides_shapes=standin.hides_shapes,
            runs_empty=standin.runs_empty,
            rtx=self._name == "tensorrt_rtx",
        )

    def _refuse(self, why: str) -> None:
        self._logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine:\n {why}")


class StandIn:
    """Both flavours of TensorRT and CUDA on one stand-in GPU, put in the place of the real modules.

    Attributes:
        cuda: the stand-in's `cudart`, whose attributes can be made to fail.
        hides_shapes: get_tensor_shape leaves out what is not fixed, as in TensorRT issue 4744.
        runs_empty: tensors without elements are executed, which nobody has seen of the real ones.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, memory: int = 1 << 30, capability: str = "8.9") -> None:
        self.device = Device(memory)
        self.cuda = Cudart(self.device, "cuda.bindings.runtime")
        self.hides_shapes, self.runs_empty = False, True
        for name in VERSIONS:
            patch.setitem(sys.modules, name, self._module(name))
        packages = {name: ModuleType(name) for name in ("cuda", "cuda.bindings")}
        for name, module in {**packages, "cuda.bindings.runtime": self.cuda}.items():
            patch.setitem(sys.modules, name, module)
        self._capability = capability
        patch.setattr(machine, "compute_capability", lambda: self._capability)
        patch.setattr(build, "open_library", lambda target: StandInLibrary(target, VERSIONS[target.backend]))

    def at(self, capability: str) -> None:
        """Makes the GPU one of another SM."""
        self._capability = capability

    def loaded(self) -> list[str]:
        """Names of the graphs whose engines are on the device."""
        weights = [each.what for each in self.device.device.values() if each.what.startswith("weights of ")]
        return sorted(Path(what).name for what in weights)

    def _module(self, name: str) -> ModuleType:
        module: Any = ModuleType(name)
        module.__version__ = VERSIONS[name]
        module.ILogger = ILogger
        module.Runtime = lambda logger: Runtime(self, name, logger)
        for each in ("TensorIOMode", "TensorLocation", "DataType", "ExecutionContextAllocationStrategy"):
            setattr(module, each, getattr(engine, each))
        module.Refitter, module.OnnxParserRefitter = engine.Refitter, engine.OnnxParserRefitter
        if name == "tensorrt_rtx":
            module.CudaGraphStrategy = engine.CudaGraphStrategy
        return module
