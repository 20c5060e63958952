"""The stand-in for TensorRT's engines and execution contexts. ONNX Runtime computes, on the CPU.

Where the real library logs an error and returns False, this one raises: the code under test should not get
there.
Shapes of outputs come from a run on zeros, since an engine must know them before it runs.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from tensorrt_standin.device import Device, RefusedError, Work

TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = Enum("TensorLocation", "DEVICE HOST")
DataType = Enum("DataType", "FLOAT HALF BF16 INT64 INT32 BOOL")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
CudaGraphStrategy = Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")

TYPES = {
    "tensor(float)": (DataType.FLOAT, np.dtype(np.float32)),
    "tensor(float16)": (DataType.HALF, np.dtype(np.float16)),
    "tensor(bfloat16)": (DataType.BF16, np.dtype(np.uint16)),
    "tensor(int64)": (DataType.INT64, np.dtype(np.int64)),
    "tensor(int32)": (DataType.INT32, np.dtype(np.int32)),
    "tensor(bool)": (DataType.BOOL, np.dtype(np.bool_)),
}
BFLOAT16 = 16  # of onnx.TensorProto


class Dims:
    """A shape as TensorRT gives it: no tuple, and not equal to one."""

    def __init__(self, sizes: Any) -> None:
        self._sizes = tuple(int(size) for size in sizes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


class Graph:
    """The ONNX graph behind a plan."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = {node.name: node for node in self.session.get_outputs()}
        self._shapes: dict[Any, dict[str, tuple[int, ...]]] = {}

    def dtype(self, name: str) -> np.dtype:
        return TYPES[(self.inputs | self.outputs)[name].type][1]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {
            name: OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
            if self.inputs[name].type == "tensor(bfloat16)"
            else OrtValue.ortvalue_from_numpy(array)
            for name, array in feeds.items()
        }
        found = self.session.run_with_ort_values(list(self.outputs), values)
        return {
            name: each.numpy() if TYPES[node.type][0] is not DataType.BF16 else _bits(each)
            for (name, node), each in zip(self.outputs.items(), found, strict=True)
        }

    def shapes(self, given: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(given.items()))
        if key not in self._shapes:
            zeros = {name: np.zeros(shape, self.dtype(name)) for name, shape in given.items()}
            self._shapes[key] = {name: each.shape for name, each in self.run(zeros).items()}
        return self._shapes[key]


class Engine:
    """`ICudaEngine`. Its weights take device memory until nobody refers to it."""

    def __init__(
        self, device: Device, plan: dict[str, Any], *, hides_shapes: bool, runs_empty: bool, rtx: bool
    ) -> None:
        self._device, self._plan = device, plan
        self._hides_shapes, self._runs_empty = hides_shapes, runs_empty
        self._graph = Graph(plan["graph"])
        self._ranges: list[dict[str, Any]] = plan["ranges"]
        address = device.allocate(plan["weights"], f"weights of {plan['graph']}")
        assert address
        weakref.finalize(self, _free, device, address)
        self.num_io_tensors = len(self._graph.inputs) + len(self._graph.outputs)
        self.num_optimization_profiles = len(self._ranges)
        self.device_memory_size_v2: int = plan["scratch"]
        self._weightless: bool = plan["stripped"]
        if rtx:
            self.create_runtime_config = lambda: RuntimeConfig(plan)

    def get_tensor_name(self, number: int) -> str:
        return [*self._graph.inputs, *self._graph.outputs][number]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if self._node(name) in self._graph.inputs.values() else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self._node(name).type][0]

    def get_tensor_location(self, name: str) -> Any:
        self._node(name)
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(size if isinstance(size, int) else -1 for size in self._node(name).shape)

    def get_tensor_profile_shape(self, name: str, number: int) -> list[Dims]:
        if name not in self._graph.inputs:
            raise RefusedError(f"{name} is no input, so it has no shape range")
        return [Dims(each) for each in self._range(number)[name]]

    def create_execution_context(self, strategy: Any = None, *, runtime_config: Any = None) -> Context:
        if (strategy is None) == (runtime_config is None):
            raise RefusedError("a context takes a strategy or a runtime config")
        if self._weightless:
            raise RefusedError("the plan has no weights, and none were put in")
        return Context(self, strategy or runtime_config.strategy, runtime_config)

    def _range(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self._ranges):
            raise RefusedError(f"there is no shape range {number}, only {len(self._ranges)}")
        return self._ranges[number]

    def _node(self, name: str) -> Any:
        known = self._graph.inputs | self._graph.outputs
        if name not in known:
            raise RefusedError(f"{name} is no tensor of this engine")
        return known[name]


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine, strategy: Any, config: RuntimeConfig | None) -> None:
        self.engine, self._config = engine, config
        self._managed = strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._range, self._shapes = 0, {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        if not self._managed:
            address = engine._device.allocate(engine.device_memory_size_v2, "activations of a context")
            assert address
            weakref.finalize(self, _free, engine._device, address)

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self.engine._device.stream(stream)
        self.engine._range(number)
        # Everything that depended on the old one must be set again.
        self._range, self._shapes, self._memory = number, {}, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in self.engine._graph.inputs:
            raise RefusedError(f"{name} is no input of this engine")
        low, _, high = self.engine._range(self._range)[name]
        fits = len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )
        if not fits:
            raise RefusedError(f"{name}: {shape} is not within {low} to {high} of range {self._range}")
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine._graph.inputs if name not in self._shapes]

    def get_tensor_shape(self, name: str) -> Dims:
        self.engine._node(name)
        if name in self._shapes:
            return Dims(self._shapes[name])
        if name in self.engine._graph.inputs or self.infer_shapes() or self.engine._hides_shapes:
            return self.engine.get_tensor_shape(name)
        return Dims(self.engine._graph.shapes(self._shapes)[name])

    def get_tensor_strides(self, name: str) -> Dims:
        shape = self.engine._graph.shapes(self._shapes)[name]
        return Dims(np.cumprod([1, *shape[:0:-1]])[::-1])

    def get_max_output_size(self, name: str) -> int:
        largest = {each: tuple(shapes[2]) for each, shapes in self.engine._range(self._range).items()}
        shape = self.engine._graph.shapes(largest)[name]
        return int(np.prod(shape, dtype=np.int64)) * self.engine._graph.dtype(name).itemsize

    def set_device_memory(self, memory: int, size: int) -> None:
        if not self._managed:
            raise RefusedError("this context has memory of its own")
        if size < self.engine.device_memory_size_v2:
            raise RefusedError(
                f"{size} bytes of device memory, but the context needs {self.engine.device_memory_size_v2}"
            )
        if memory % 256:
            raise RefusedError(f"{memory:#x} is not aligned to 256")
        self.engine._device.find(memory, size, "device memory of a context")
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.engine._node(name)
        self.engine._device.find(memory, 0, name)
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Queues a run on what is set now; it happens when somebody waits for the stream."""
        engine, device, graph = self.engine, self.engine._device, self.engine._graph
        if missing := self.infer_shapes():
            raise RefusedError(f"{missing[0]} has no shape")
        if self._managed and self._memory is None:
            raise RefusedError("the context has no device memory")
        shapes = {**self._shapes, **graph.shapes(self._shapes)}
        places = {}
        for name, shape in shapes.items():
            if name not in self._addresses:
                raise RefusedError(f"{name} has no address")
            size = int(np.prod(shape, dtype=np.int64)) * graph.dtype(name).itemsize
            if not (size or engine._runs_empty):
                raise RefusedError(f"{name} of {list(shape)} is empty, which this library does not run")
            places[name] = (device.find(self._addresses[name], size, name), shape, size)
        scratch = [device.find(*self._memory, "device memory of a context")] if self._memory else []
        used = [place for place, _, _ in places.values()] + scratch
        for name in graph.outputs:
            if sum(place is places[name][0] for place in used) > 1:
                raise RefusedError(f"{name} shares its memory with another tensor or the activations")
        alive = weakref.ref(self)

        def run() -> None:
            if alive() is None:
                raise RefusedError("the context was destroyed while a run was queued")
            feeds = {name: _read(name, *places[name], graph.dtype(name)) for name in graph.inputs}
            for memory in scratch:
                memory.data[:] = 0xFF
                memory.filled = 0
            for name, array in graph.run(feeds).items():
                memory, shape, size = places[name]
                assert array.shape == shape, f"{name}: {array.shape} came out, {shape} was said"
                memory.data[:size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                memory.filled, memory.dtype = size, str(graph.dtype(name))

        device.queue(stream, Work(f"a run of {engine._plan['graph']}", used, run))
        if self._config and self._config.cache:
            self._config.cache.kernels.add(str(sorted(self._shapes.items())))
        return True


class RuntimeConfig:
    """`IRuntimeConfig` of TensorRT-RTX."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.cache: RuntimeCache | None = None
        self._version = plan["version"]

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._version)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """`IRuntimeCache`: the kernels are names."""

    def __init__(self, version: str) -> None:
        self.version, self.kernels = version, set[str]()

    def serialize(self) -> bytes:
        return "\n".join([f"kernels {self.version}", *sorted(self.kernels)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        first, *kernels = blob.decode(errors="replace").split("\n")
        if first != f"kernels {self.version}":
            return False
        self.kernels.update(kernels)
        return True


class Refitter:
    """`trt.Refitter`."""

    def __init__(self, engine: Engine, logger: Any) -> None:
        self.engine, self.found = engine, False

    def refit_cuda_engine(self) -> bool:
        self.engine._weightless = self.engine._weightless and not self.found
        return self.found


class OnnxParserRefitter:
    """`trt.OnnxParserRefitter`: takes the very graph that the plan was built from."""

    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        self.refitter.found = digest == self.refitter.engine._plan["sha256"]
        return self.refitter.found


def _read(name: str, memory: Any, shape: tuple[int, ...], size: int, dtype: np.dtype) -> np.ndarray:
    if size and memory.filled != size:
        raise RefusedError(f"{name}: {list(shape)} has {size} bytes, but {memory.filled} were written there")
    if size and memory.dtype not in (None, str(dtype)):
        raise RefusedError(f"{name}: {dtype} is read where an engine wrote {memory.dtype}")
    return memory.data[:size].copy().view(dtype).reshape(shape)


def _bits(value: OrtValue) -> np.ndarray:
    """A bfloat16 OrtValue as uint16."""
    import ctypes

    shape = value.shape()
    size = int(np.prod(shape, dtype=np.int64))
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr())
    return np.frombuffer(memory, np.uint16).reshape(shape).copy()


def _free(device: Device, address: int) -> None:
    if address in device.device:
        device.free(address)
