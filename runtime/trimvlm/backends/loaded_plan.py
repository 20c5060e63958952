"""One plan of TensorRT: loaded, described, and run on addresses that others give it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trimvlm.backends import Port
from trimvlm.backends.plan_library import PlanLibrary
from trimvlm.backends.shape_ranges import Range, Shape, choose
from trimvlm.errors import UserError

# Names of `trt.DataType`; bfloat16 is float32 for numpy and converted on the way.
_DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(np.float32),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        port: for whoever feeds or fetches it.
        bfloat16: its elements have two bytes on the device.
    """

    port: Port
    bfloat16: bool = False

    def bytes(self, shape: Shape) -> int:
        """Of the tensor on the device."""
        return int(np.prod(shape, dtype=np.int64)) * (2 if self.bfloat16 else self.port.dtype.itemsize)


class LoadedPlan:
    """A plan that is loaded and dropped, as often as engines take turns.

    Args:
        graph: the ONNX graph that a plan without weights takes them from; None: it has its own.

    Attributes:
        inputs, outputs: the engine's tensors by name.
        ranges: sets of shape ranges of the inputs.
        scratch: bytes of device memory that a run needs besides its tensors.
    """

    def __init__(self, library: PlanLibrary, role: str, path: Path, graph: Path | None = None) -> None:
        self.library, self.role, self.path, self.graph = library, role, path, graph
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.ranges: list[dict[str, Range]] = []
        self.scratch = 0
        self._engine: Any = None
        self._context: Any = None
        self._range = 0

    @property
    def loaded(self) -> bool:
        """Whether it can run now."""
        return self._context is not None

    def load(self, runtime: Any) -> None:
        """Deserialises the plan from the mapped file; the host holds no copy of it.

        Raises:
            UserError: the library refuses it, with its own reason.
        """
        logger = self.library.logger
        logger.taken()
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused("cannot load this plan", _remedy(said := logger.taken()), said)
        if self.graph:
            self._put_weights_in(self.graph)
        self._describe()
        self._context = self.library.create_context(self._engine, self.path)
        if self._context is None:
            self._engine = None
            raise self._refused("cannot prepare this plan", _remedy(said := logger.taken()), said)
        self._range = 0

    def unload(self) -> None:
        """Gives back the engine's device memory. Nothing of it may be queued."""
        if self._context is not None:
            self.library.leave_context(self._context, self.path)
        self._context = self._engine = None  # in this order, since a context refers to its engine

    def set_shapes(self, shapes: Mapping[str, Shape], stream: int) -> dict[str, Shape | None]:
        """Sets the shapes of all inputs, and the set of ranges that admits them.

        Returns:
            Shapes of all outputs; None where the engine does not say one.

        Raises:
            UserError: no range admits them, see `choose`.
        """
        wanted = choose(self.role, self.ranges, shapes)
        if wanted != self._range:
            try:
                taken = self._context.set_optimization_profile_async(wanted, stream)
            except RuntimeError:  # where other functions return False
                taken = False
            self._must(taken, "take a shape range")
            self._range = wanted
        for name, shape in shapes.items():
            self._must(self._context.set_input_shape(name, shape), f"take {name} of {list(shape)}")
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._refused(
                "cannot infer shapes", "build it again", " ".join(str(error).split())
            ) from None
        assert not missing, f"{self.role}: {missing} have no shape"
        return {name: self._shape(name) for name in self.outputs}

    def bytes(self, name: str, shape: Shape | None) -> int:
        """Of an output of the run whose shapes were set; the most it can have where its shape is not said.

        Raises:
            UserError: the engine does not say that either.
        """
        if shape is not None:
            return self.outputs[name].bytes(shape)
        size = self._context.get_max_output_size(name)
        if size < 0:
            raise self.unsaid(name)
        return size

    def largest(self, stream: int) -> dict[str, int]:
        """Bytes of the outputs for the largest inputs of any set of ranges."""
        found: dict[str, int] = {}
        for ranges in self.ranges:
            shapes = self.set_shapes({name: each.max for name, each in ranges.items()}, stream)
            for name, shape in shapes.items():
                found[name] = max(self.bytes(name, shape), found.get(name, 0))
        return found

    def run(self, addresses: Mapping[str, int], scratch: int, size: int, stream: int) -> None:
        """Queues a run on the shapes that were set.

        Args:
            addresses: of all inputs and outputs on the device.
            scratch: address of `size` bytes.

        Raises:
            UserError: the library refuses.
        """
        self._context.set_device_memory(scratch, size)
        for name, address in addresses.items():
            self._must(self._context.set_tensor_address(name, address), f"take an address for {name}")
        self._must(self._context.execute_async_v3(stream), "run")

    def _put_weights_in(self, graph: Path) -> None:
        trt, logger = self.library.trt, self.library.logger
        refitter = trt.Refitter(self._engine, logger)
        done = trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(graph))
        if not (done and refitter.refit_cuda_engine()):
            self._engine = None
            said = logger.taken()
            raise self._refused(f"cannot put the weights of {graph.name} in", _remedy(said), said)

    def _describe(self) -> None:
        engine, trt = self._engine, self.library.trt
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            kind = engine.get_tensor_dtype(name).name
            if kind not in _DTYPES or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                raise self._refused(
                    f"wants {name} ({kind}) in a way that trimvlm does not know", "export again"
                )
            free = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
            tensor = Tensor(Port(_DTYPES[kind], free), bfloat16=kind == "BF16")
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs)[name] = tensor
        self.ranges = [
            {name: self._range_of(name, number) for name in self.inputs}
            for number in range(engine.num_optimization_profiles)
        ]
        self.scratch = engine.device_memory_size_v2

    def _range_of(self, name: str, number: int) -> Range:
        low, _, high = self._engine.get_tensor_profile_shape(name, number)
        return Range(tuple(low), tuple(high))

    def unsaid(self, name: str) -> UserError:
        """What to raise where the shape of an output must be known, and is not."""
        return self._refused(
            f"does not say what shape {name} has",
            "use another version of it (github.com/NVIDIA/TensorRT/issues/4744)",
        )

    def _shape(self, name: str) -> Shape | None:
        """Of an output. TensorRT 10.16 on Thor was seen to leave out sizes that follow from its strides
        (github.com/NVIDIA/TensorRT/issues/4744)."""
        shape = list(self._context.get_tensor_shape(name))
        if -1 in shape:
            strides = list(self._context.get_tensor_strides(name))
            for axis, size in enumerate(shape):
                if size < 0 and axis and strides[axis] > 0 and strides[axis - 1] > 0:
                    shape[axis] = strides[axis - 1] // strides[axis]
        return None if -1 in shape else tuple(shape)

    def _must(self, done: bool, what: str) -> None:
        if not done:
            raise self._refused(f"does not {what}", "build it again", self.library.logger.taken())

    def _refused(self, what: str, remedy: str, reason: str = "") -> UserError:
        library = self.library
        said = f" ({reason})" if reason else ""
        return UserError(f"{self.path}: {library.name} {library.version} {what}{said}; {remedy}")


def _remedy(said: str) -> str:
    if "memory" in said.lower():
        return "free memory on the GPU, or let the engines take turns (turns=True)"
    return "build it again with trimvlm build on this machine"
