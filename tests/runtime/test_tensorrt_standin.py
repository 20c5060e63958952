"""The stand-in refuses what CUDA and TensorRT would refuse, answer wrongly or crash on. It computes, too."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from tensorrt_standin import Device, ILogger, RefusedError, Runtime, StandIn
from tensorrt_standin.cudart import cudaError_t, cudaMemcpyKind
from tensorrt_standin.engine import ExecutionContextAllocationStrategy as Strategy
from tensorrt_standin.engine import OnnxParserRefitter, Refitter, RuntimeCache, RuntimeConfig
from tensorrt_standin.plans import SCRATCH, write_plan

UP, DOWN = cudaMemcpyKind.cudaMemcpyHostToDevice, cudaMemcpyKind.cudaMemcpyDeviceToHost
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
running (float[rows, 2] new, float[past, 2] before) => (float[total, 2] after, float16[rows, 2] half)
{
    after = Concat <axis = 0> (before, new)
    half = Cast <to = 10> (new)
}
"""
WIDE = {"new": [[0, 2], [1, 2], [4, 2]], "before": [[0, 2], [1, 2], [8, 2]]}
NARROW = {"new": [[1, 2], [1, 2], [1, 2]], "before": [[0, 2], [1, 2], [8, 2]]}


NAMES = Path(__file__).parent.parent / "data/tensorrt_running_names.json"
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None  # before the stand-in takes its place
INSIDE = {"engine", "found", "refitter", "strategy", "cache", "version", "kernels"}  # of the stand-in


def real(name: str) -> Any:
    """The library itself, whose place the stand-in has taken."""
    standin = sys.modules.pop(name)
    try:
        return importlib.import_module(name)
    finally:
        sys.modules[name] = standin


class Log(ILogger):
    def __init__(self) -> None:
        ILogger.__init__(self)
        self.said: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.said.append(message)


class Bench:
    """A stand-in with an engine of two ranges, and the few steps that a run takes."""

    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self.standin = StandIn(patch)
        self.device, self.cuda, self.log = self.standin.device, self.standin.cuda, Log()
        onnx.save(onnx.parser.parse_model(GRAPH), directory / "running.onnx")
        self.plan = write_plan(
            directory / "running.onnx", [WIDE, NARROW], library="tensorrt", version="10.3.0.30"
        )
        self.runtime = Runtime(self.standin, "tensorrt", self.log)
        self.engine = self.runtime.deserialize_cuda_engine(self.plan)
        assert self.engine is not None
        self.context: Any = self.engine.create_execution_context(Strategy.USER_MANAGED)
        self.stream = self.cuda.cudaStreamCreateWithFlags(1)[1]
        self.host = self.cuda.cudaMallocHost(4096)[1]
        self.new, self.before, self.after, self.half, self.scratch = (
            self.cuda.cudaMalloc(size)[1] for size in (32, 64, 96, 16, SCRATCH)
        )

    @property
    def bytes(self) -> np.ndarray:
        """Page-locked memory."""
        return self.device.host[self.host].data

    def upload(self, address: int, values: np.ndarray) -> None:
        data = np.frombuffer(values.tobytes(), np.uint8)
        self.bytes[: len(data)] = data
        self.cuda.cudaMemcpyAsync(address, self.host, len(data), UP, self.stream)
        self.cuda.cudaStreamSynchronize(self.stream)

    def prepare(self, new: int = 2, before: int = 3) -> None:
        """Everything up to the run itself, on `new` rows of ones and `before` rows of twos."""
        if new:
            self.upload(self.new, np.ones((new, 2), np.float32))
        if before:
            self.upload(self.before, np.full((before, 2), 2, np.float32))
        self.context.set_input_shape("new", (new, 2))
        self.context.set_input_shape("before", (before, 2))
        self.context.set_device_memory(self.scratch, SCRATCH)
        for name in ("new", "before", "after", "half"):
            self.context.set_tensor_address(name, getattr(self, name))

    def run(self) -> None:
        self.context.execute_async_v3(int(self.stream))
        self.cuda.cudaStreamSynchronize(self.stream)

    def read(self, address: int, size: int) -> np.ndarray:
        self.cuda.cudaMemcpyAsync(self.host, address, size, DOWN, self.stream)
        self.cuda.cudaStreamSynchronize(self.stream)
        return self.bytes[:size].copy()


def empty(bench: Bench) -> None:
    assert bench.engine is not None
    bench.engine._runs_empty = False
    bench.prepare(1, 0)
    bench.run()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return Bench(monkeypatch, tmp_path)


@pytest.mark.parametrize(("new", "before"), [(2, 3), (1, 0), (0, 8)])
def test_it_computes(bench: Bench, new: int, before: int) -> None:
    bench.prepare(new, before)
    assert tuple(bench.context.get_tensor_shape("after")) == (new + before, 2)
    bench.run()
    after = bench.read(bench.after, (new + before) * 8).view(np.float32)
    assert after.tolist() == [2.0] * 2 * before + [1.0] * 2 * new
    if new:
        assert bench.read(bench.half, new * 4).view(np.float16).tolist() == [1.0] * 2 * new


def test_nothing_happens_before_somebody_waits(bench: Bench) -> None:
    """A result that is read too early is not a number."""
    bench.prepare()
    bench.context.execute_async_v3(int(bench.stream))
    bench.cuda.cudaMemcpyAsync(bench.host, bench.after, 40, DOWN, bench.stream)
    assert np.isnan(bench.bytes[:40].view(np.float32)).all()
    assert bench.device.device[bench.after].filled == 0
    bench.cuda.cudaStreamSynchronize(bench.stream)
    assert bench.bytes[:40].view(np.float32).tolist() == [2.0] * 6 + [1.0] * 4


def early_free(bench: Bench) -> None:
    bench.prepare()
    bench.context.execute_async_v3(int(bench.stream))
    bench.cuda.cudaFree(bench.after)


def early_free_host(bench: Bench) -> None:
    bench.cuda.cudaMemcpyAsync(bench.new, bench.host, 8, UP, bench.stream)
    bench.cuda.cudaFreeHost(bench.host)


def early_destroy(bench: Bench) -> None:
    bench.cuda.cudaMemcpyAsync(bench.new, bench.host, 8, UP, bench.stream)
    bench.cuda.cudaStreamDestroy(bench.stream)


def early_change(bench: Bench) -> None:
    bench.bytes[:8] = 1
    bench.cuda.cudaMemcpyAsync(bench.new, bench.host, 8, UP, bench.stream)
    bench.bytes[:8] = 2
    bench.cuda.cudaStreamSynchronize(bench.stream)


def freed(bench: Bench) -> int:
    bench.cuda.cudaFree(bench.half)
    return bench.half


def free_twice(bench: Bench) -> None:
    bench.cuda.cudaFree(freed(bench))


def dropped(bench: Bench) -> None:
    bench.prepare()
    bench.context.execute_async_v3(int(bench.stream))
    bench.context = None
    bench.cuda.cudaStreamSynchronize(bench.stream)


def without(name: str) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        bench.prepare()
        del bench.context._addresses[name]
        bench.run()

    return run


def other_range(bench: Bench) -> None:
    """Shapes and memory must be set anew."""
    bench.prepare(1, 3)
    bench.context.set_optimization_profile_async(1, int(bench.stream))
    bench.run()


def no_memory(bench: Bench) -> None:
    bench.prepare()
    bench.context._memory = None
    bench.run()


def wrong_dtype(bench: Bench) -> None:
    bench.prepare()
    bench.upload(bench.new, np.ones((2, 2), np.float64))
    bench.run()


def read_as_another_dtype(bench: Bench) -> None:
    """What the engine wrote as float16 is fed as float32."""
    bench.prepare(2, 3)
    bench.run()
    bench.context.set_tensor_address("new", bench.half)
    bench.context.set_input_shape("new", (1, 2))
    bench.context.set_tensor_address("half", bench.cuda.cudaMalloc(16)[1])
    bench.run()


def too_small(bench: Bench) -> None:
    bench.prepare()
    bench.context.set_tensor_address("after", bench.cuda.cudaMalloc(39)[1])
    bench.run()


def shared(bench: Bench) -> None:
    bench.prepare()
    bench.context.set_tensor_address("after", bench.before)
    bench.run()


def never_written(bench: Bench) -> None:
    bench.prepare()
    bench.context.set_tensor_address("new", bench.cuda.cudaMalloc(32)[1])
    bench.run()


def copy(target: str, source: str, size: int, kind: cudaMemcpyKind) -> Callable[[Bench], None]:
    def run(bench: Bench) -> None:
        pageable = np.zeros(64, np.uint8)
        places = {"pageable": pageable.ctypes.data, "freed": 0, "host": bench.host, "new": bench.new}
        if "freed" in (target, source):
            places["freed"] = freed(bench)
        bench.cuda.cudaMemcpyAsync(places[target], places[source], size, kind, bench.stream)
        bench.cuda.cudaStreamSynchronize(bench.stream)

    return run


REFUSED: dict[str, tuple[Callable[[Bench], Any], str]] = {
    "freed in use": (early_free, "freed while a run of .* is queued"),
    "host memory freed in use": (early_free_host, "freed while a copy to the device is queued"),
    "stream destroyed in use": (early_destroy, "destroyed before"),
    "host memory changed in use": (early_change, "host memory changed"),
    "context dropped in use": (dropped, "destroyed while a run was queued"),
    "freed twice": (free_twice, "freed twice"),
    "free of a host address": (lambda b: b.cuda.cudaFree(b.host), "was never allocated so"),
    "free of the middle": (lambda b: b.cuda.cudaFree(b.new + 256), "was never allocated so"),
    "nothing allocated": (lambda b: b.cuda.cudaMalloc(0), "0 bytes"),
    "nothing page-locked": (lambda b: b.cuda.cudaMallocHost(0), "0 bytes"),
    "address of nothing": (lambda b: b.context.set_tensor_address("new", 0), "null"),
    "address on the host": (lambda b: b.context.set_tensor_address("new", b.host), "address of the host"),
    "address after free": (lambda b: b.context.set_tensor_address("new", freed(b)), "after it was freed"),
    "address in a gap": (lambda b: b.context.set_tensor_address("new", b.new + 512), "nothing was allocated"),
    "address of another type": (lambda b: b.context.set_tensor_address("new", None), "is no address"),
    "address of no tensor": (lambda b: b.context.set_tensor_address("old", b.new), "old is no tensor"),
    "shape of no tensor": (lambda b: b.context.set_input_shape("old", (1, 2)), "old is no input"),
    "shape of an output": (lambda b: b.context.set_input_shape("after", (1, 2)), "after is no input"),
    "shape above the range": (lambda b: b.context.set_input_shape("new", (5, 2)), "not within"),
    "shape of another rank": (lambda b: b.context.set_input_shape("new", (1, 2, 1)), "not within"),
    "range that is not": (
        lambda b: b.context.set_optimization_profile_async(2, int(b.stream)),
        "no shape range 2",
    ),
    "range of an output": (lambda b: b.engine.get_tensor_profile_shape("after", 0), "is no input"),
    "dtype of no tensor": (lambda b: b.engine.get_tensor_dtype("old"), "old is no tensor"),
    "run without a shape": (lambda b: b.run(), "new has no shape"),
    "run without an address": (without("new"), "new has no address"),
    "run without an output's address": (without("half"), "half has no address"),
    "run after another range": (other_range, "has no shape"),
    "run without memory": (no_memory, "no device memory"),
    "run on the default stream": (
        lambda b: (b.prepare(), b.context.execute_async_v3(0)),
        "the default stream",
    ),
    "run on no stream": (lambda b: (b.prepare(), b.context.execute_async_v3(7)), "is no stream"),
    "memory too small": (
        lambda b: b.context.set_device_memory(b.scratch, SCRATCH - 1),
        "the context needs",
    ),
    "memory smaller than said": (
        lambda b: b.context.set_device_memory(b.after, SCRATCH),
        "do not fit",
    ),
    "memory not aligned": (lambda b: b.context.set_device_memory(b.scratch + 1, SCRATCH), "not aligned"),
    "memory of its own": (
        lambda b: b.engine.create_execution_context(Strategy.STATIC).set_device_memory(b.scratch, SCRATCH),
        "memory of its own",
    ),
    "context of nothing": (lambda b: b.engine.create_execution_context(), "a strategy or a runtime config"),
    "wrong dtype": (wrong_dtype, r"new: \[2, 2\] has 16 bytes, but 32 were written"),
    "another dtype of the same size": (
        read_as_another_dtype,
        "float32 is read where an engine wrote float16",
    ),
    "empty where empty is not run": (empty, r"before of \[0, 2\] is empty"),
    "output too small": (too_small, "40 bytes do not fit the 39"),
    "output over an input": (shared, "shares its memory"),
    "input never written": (never_written, "0 were written there"),
    "copy from pageable memory": (copy("new", "pageable", 8, UP), "not page-locked"),
    "copy to pageable memory": (copy("pageable", "new", 8, DOWN), "not page-locked"),
    "copy to the host as if it were the device": (copy("host", "host", 8, UP), "address of the host"),
    "copy beyond the device's": (copy("new", "host", 33, UP), "do not fit"),
    "copy beyond the host's": (copy("new", "host", 5000, UP), "do not fit"),
    "copy of what was freed": (copy("host", "freed", 8, DOWN), "after it was freed"),
    "copy of what was never written": (copy("host", "new", 8, DOWN), "where 0 were written"),
    "copy of another kind": (
        copy("new", "new", 8, cudaMemcpyKind.cudaMemcpyDeviceToDevice),
        "only copies between",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(bench: Bench, case: str) -> None:
    do, message = REFUSED[case]
    with pytest.raises(RefusedError, match=message):
        do(bench)


def test_what_is_left_is_named(bench: Bench) -> None:
    with pytest.raises(
        RefusedError, match=r"bytes of weights of .*, 32 bytes of memory, .*page-locked.*stream"
    ):
        bench.device.assert_clean()
    bench.context = bench.engine = None
    for address in (bench.new, bench.before, bench.after, bench.half, bench.scratch):
        bench.cuda.cudaFree(address)
    bench.cuda.cudaFreeHost(bench.host)
    bench.cuda.cudaStreamDestroy(bench.stream)
    bench.device.assert_clean()


def test_full_memory_is_an_error_and_not_a_refusal(bench: Bench) -> None:
    error, address = bench.cuda.cudaMalloc(bench.device.memory)
    assert (error, address) == (cudaError_t.cudaErrorMemoryAllocation, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: b"ONNX" + plan, "magicTag"),
        (lambda plan: plan.replace(b"10.3.0.30", b"10.4.0.30"), "not compatible with this version"),
        (lambda plan: plan.replace(b'"tensorrt"', b'"tensorrt_rtx"'), "not compatible with this version"),
        (lambda plan: plan.replace(b'"weights": ', b'"weights": 99999999999'), "OutOfMemory"),
    ],
)
def test_plans_of_something_else_are_refused_in_the_log(bench: Bench, change: Any, said: str) -> None:
    assert bench.runtime.deserialize_cuda_engine(change(bench.plan)) is None
    assert said in bench.log.said[-1]


def test_a_logger_must_be_one(bench: Bench) -> None:
    class Forgetful(Log):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match=r"ILogger\.__init__"):
        Runtime(bench.standin, "tensorrt", Forgetful())


def test_weights_take_memory_as_long_as_their_engine_lives(bench: Bench) -> None:
    used = bench.device.used
    engine = bench.runtime.deserialize_cuda_engine(bench.plan)
    assert engine is not None
    context = engine.create_execution_context(Strategy.STATIC)
    assert bench.device.used > used + SCRATCH
    del engine
    assert bench.device.used > used  # the context refers to it
    del context
    assert bench.device.used == used


def test_it_offers_only_what_the_real_libraries_have(bench: Bench) -> None:
    """Names of classic TensorRT from its bindings, of TensorRT-RTX from the library where it is installed."""
    known = set(json.loads(NAMES.read_text())["everywhere"])
    rtx = real("tensorrt_rtx") if HAS_RTX else None
    kinds = {
        "Runtime": bench.runtime,
        "ICudaEngine": bench.engine,
        "IExecutionContext": bench.context,
        "Refitter": Refitter(bench.engine, bench.log),  # type: ignore[arg-type]
        "OnnxParserRefitter": OnnxParserRefitter(None, bench.log),  # type: ignore[arg-type]
    }
    for kind, made in kinds.items():
        offered = {name for name in dir(made) if not name.startswith("_")} - INSIDE
        assert offered and offered <= known, kind
        assert not rtx or offered <= set(dir(getattr(rtx, kind))), kind
    for name in ("IRuntimeConfig", "IRuntimeCache") if rtx else ():
        made = RuntimeConfig({"version": ""}) if name == "IRuntimeConfig" else RuntimeCache("")
        offered = {each for each in dir(made) if not each.startswith("_")} - INSIDE
        assert offered <= set(dir(getattr(rtx, name))), name
    classic = sys.modules["tensorrt"]
    assert {name for name in vars(classic) if not name.startswith("_")} <= known


def test_devices_are_apart() -> None:
    one, other = Device(), Device()
    address = one.allocate(8)
    assert address is not None
    with pytest.raises(RefusedError, match="nothing was allocated"):
        other.find(address, 8, "it")
