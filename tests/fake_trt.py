"""A module like `tensorrt` of a given version, for the builder: it has the names of that version, raises
where the real one would, and writes down what it was asked to build. Its plans are JSON; none can run.

What each version has comes from tests/data/tensorrt_names.json. The parser reads inputs only.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx

NAMES = json.loads((Path(__file__).parent / "data/tensorrt_names.json").read_text())
STEPS = 40


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class TimingCache:
    """Times by kernel, of one device; `serialize` and back."""

    def __init__(self, data: bytes, device: str) -> None:
        self.device, self.times = (device, {}) if not data else json.loads(data)

    def combine(self, other: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch, "times of another GPU are worthless"
        if other.device != self.device:
            return False
        self.times = {**other.times, **self.times}
        return True

    def serialize(self) -> memoryview:
        return memoryview(json.dumps([self.device, self.times]).encode())


class Config:
    """An IBuilderConfig."""

    def __init__(self, device: str) -> None:
        self.flags = {"TF32"}
        self.profiles: list[dict[str, list[list[int]]]] = []
        self.progress_monitor: Any = None
        self._device, self._cache = device, TimingCache(b"", device)

    def clear_flag(self, flag: enum.Enum) -> None:
        self.flags.discard(flag.name)

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.add(flag.name)

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        try:
            return TimingCache(data, self._device)
        except ValueError:
            return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.device != self._device:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache:
        return self._cache


class Profile:
    """An IOptimizationProfile."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: Any, typical: Any, high: Any) -> None:
        assert all(0 <= a <= b <= c for a, b, c in zip(low, typical, high, strict=True))
        self.shapes[name] = [list(low), list(typical), list(high)]


def fake_tensorrt(
    version: str, *, device: str = "Orin", at_step: Callable[[int], None] = lambda step: None
) -> Any:
    """The module. `at_step` is called at each step of a build."""
    missing = set(NAMES["missing"][version])

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def create_network(self, flags: int) -> SimpleNamespace:
            typed = version.startswith("11") or bool(
                flags & (1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            )
            return SimpleNamespace(typed=typed, inputs=[], num_inputs=0, num_layers=0, get_layer=None)

        def create_builder_config(self) -> Config:
            return Config(device)

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> memoryview | None:
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, STEPS)
            monitor.phase_start("Timing tactics", "Building engine", STEPS)
            for step in range(STEPS):
                at_step(step)
                if not monitor.step_complete("Timing tactics", step):
                    self._logger.log(Severity.ERROR, "Error Code 7: BuildCanceled")
                    return None
            monitor.phase_finish("Timing tactics")
            monitor.phase_finish("Building engine")
            config.get_timing_cache().times[f"kernel of {network.name}"] = 1.5
            plan = {"typed": network.typed, "flags": sorted(config.flags), "profiles": config.profiles}
            return memoryview(json.dumps(plan).encode())

    def to_stream(self: Builder, network: Any, config: Config, writer: Any) -> bool:
        plan = self.build_serialized_network(network, config)
        return plan is not None and writer.write(bytes(plan)) == len(plan)

    if "build_serialized_network_to_stream" not in missing:
        Builder.build_serialized_network_to_stream = to_stream  # type: ignore[attr-defined]

    class OnnxParser:
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            for node in onnx.load(path, load_external_data=False).graph.input:
                dims = [
                    dim.dim_value if dim.HasField("dim_value") else -1
                    for dim in node.type.tensor_type.shape.dim
                ]
                self._network.inputs.append(SimpleNamespace(name=node.name, shape=dims))
            self._network.name = Path(path).name
            self._network.num_inputs = len(self._network.inputs)
            self._network.get_input = self._network.inputs.__getitem__
            return True

    def members(*names: str) -> Any:
        return enum.IntEnum(
            "members", {name: number for number, name in enumerate(names) if name not in missing}
        )

    trt: Any = SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        Builder=Builder,
        OnnxParser=OnnxParser,
        ILogger=type("ILogger", (), {"Severity": Severity}),
        IProgressMonitor=type("IProgressMonitor", (), {}),
        IStreamWriter=type("IStreamWriter", (), {}),
        NetworkDefinitionCreationFlag=members("EXPLICIT_BATCH", "STRONGLY_TYPED"),
        BuilderFlag=members("TF32", "VERSION_COMPATIBLE", "STRIP_PLAN", "REFIT_IDENTICAL"),
        LayerType=members("CONVOLUTION", "ATTENTION_OUTPUT"),
    )
    for name in missing & set(vars(trt)):
        delattr(trt, name)
    return trt
