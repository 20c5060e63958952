"""Providers of ONNX Runtime that are not the CPU, without a GPU: what is refused, asked and kept where."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from toy_bundle import toy_answer, toy_pixels, write_toy_bundle

from trimvlm.backends.providers import CPU, CUDA, RTX, check_provider, create_session, nodes_on_cpu
from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.decoding import Decoder, generate_ids
from trimvlm.errors import UserError
from trimvlm.text import Prompt

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    out = write_toy_bundle(tmp_path / "bundle")
    return {"vision": out / "vision.onnx", "decoder": out / "toy.decoder.fused.onnx"}


class Binding:
    """A binding of the CPU's that notes where each output was asked for; there is no other memory here."""

    def __init__(self, real: Any, places: dict[str, tuple[str, int]]) -> None:
        self.real, self.places = real, places

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.real.bind_ortvalue_input(name, value)

    def bind_output(self, name: str, device_type: str = "cpu", device_id: int = 0) -> None:
        self.places[name] = (device_type, device_id)
        self.real.bind_output(name)

    def get_outputs(self) -> Any:
        return self.real.get_outputs()


class GpuSession:
    """A session that says it has the providers it was asked for; the CPU does the work."""

    made: list[GpuSession] = []

    def __init__(self, path: Path, options: Any, providers: list[Any]) -> None:
        self.asked = providers
        self.real = REAL(path, options, providers=[CPU])
        self.places: dict[str, tuple[str, int]] = {}
        self.shrunk: list[str] = []
        self.made.append(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def get_providers(self) -> list[str]:
        return [each if isinstance(each, str) else each[0] for each in self.asked]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        nodes = [SimpleNamespace(op_type=kind) for kind in ("Shape", "Min", "Shape")]
        return [
            SimpleNamespace(ep_name=CPU, get_nodes=lambda: nodes),
            SimpleNamespace(ep_name=CUDA, get_nodes=lambda: nodes[:1]),
        ]

    def io_binding(self) -> Binding:
        return Binding(self.real.io_binding(), self.places)

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        key = "memory.enable_memory_arena_shrinkage"
        self.shrunk.append(options.get_run_config_entry(key) if options else "")
        self.real.run_with_iobinding(binding.real)


REAL = onnxruntime.InferenceSession


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[GpuSession]:
    monkeypatch.setattr(GpuSession, "made", [])
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", GpuSession)
    return GpuSession


def test_caches_stay_on_the_device(files: dict[str, Path], gpu: type[GpuSession]) -> None:
    with open_backend(files, provider=CUDA, device=1, threads=1) as backend:
        pixels = toy_pixels(1.0)
        visual = backend.run("vision", {"pixel_values": pixels}, ["visual"])["visual"]
        caches = [name for name in backend.outputs("decoder") if name.startswith("present_")]
        decoder = Decoder(backend, ["logits"], caches)
        prompt = Prompt(
            input_ids=np.array([1, 5, 9]),
            text_positions=np.array([0, 1, 6]),
            visual_positions=np.arange(2, 6),
        )
        ids = list(
            generate_ids(
                decoder, prompt, visual, lambda logits: int(logits.argmax()), eos_ids=(2,), max_new_tokens=5
            )
        )
    assert ids == toy_answer(visual, [1, 5, 9], 7, 5)
    sessions: Mapping[str, GpuSession] = {"vision": gpu.made[0], "decoder": gpu.made[1]}
    assert sessions["decoder"].places == {"logits": ("cpu", 0), **dict.fromkeys(caches, ("cuda", 1))}
    assert sessions["vision"].places == {"visual": ("cpu", 0)}
    assert sessions["vision"].shrunk == ["gpu:1"] and set(sessions["decoder"].shrunk) == {""}
    (asked, given), fallback = sessions["decoder"].asked
    assert (asked, fallback) == (CUDA, CPU)
    assert (given["device_id"], given["use_tf32"]) == ("1", "0")


def test_provider_that_is_not_installed_is_named(files: dict[str, Path]) -> None:
    available = onnxruntime.get_available_providers()
    if CUDA in available:
        pytest.skip("there is a CUDA provider here")
    with pytest.raises(UserError, match=r"which has .*CPUExecutionProvider; .*trimvlm\[ort-gpu\]") as caught:
        open_backend(files, provider=CUDA)
    assert all(name in str(caught.value) for name in (CUDA, onnxruntime.__version__, *available))


def test_provider_that_does_not_start_is_no_reason_for_the_cpu(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where CUDA's libraries are missing: ONNX Runtime only warns."""
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("there is a CUDA provider here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    with (
        pytest.warns(UserWarning, match="not in available provider names"),
        pytest.raises(UserError, match=r"toy\.decoder.*CUDAExecutionProvider did not start.*trimvlm doctor"),
        open_backend({"decoder": files["decoder"]}, provider=CUDA),
    ):
        pass


def test_provider_that_takes_no_node_is_refused(
    files: dict[str, Path], gpu: type[GpuSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "get_provider_graph_assignment_info", lambda self: [])
    with pytest.raises(UserError, match="takes no node of this graph"):
        create_session(onnxruntime, files["decoder"], onnxruntime.SessionOptions(), CUDA, 0)


def test_what_is_left_to_the_cpu_is_counted(files: dict[str, Path], gpu: type[GpuSession]) -> None:
    session = create_session(onnxruntime, files["decoder"], onnxruntime.SessionOptions(), CUDA, 0)
    left = nodes_on_cpu(session, CUDA)
    assert left == {"Min": 1, "Shape": 2} and str(left) == "Min 1, Shape 2"
    assert left is not None and left.elsewhere == 1


@pytest.mark.skipif(not hasattr(REAL, "get_provider_graph_assignment_info"), reason="ONNX Runtime is too old")
def test_onnx_runtime_tells_where_nodes_run(files: dict[str, Path]) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = REAL(files["vision"], options, providers=[CPU])
    left = nodes_on_cpu(session, CUDA)
    assert left is not None and left["AveragePool"] == 1 and left.elsewhere == 0


class Plugin:
    """The package of TensorRT-RTX's provider, and the part of ONNX Runtime that loads it."""

    def __init__(self, patch: pytest.MonkeyPatch, devices: int, error: Exception | None = None) -> None:
        self.found: list[Any] = []
        self.devices, self.error = devices, error
        patch.setitem(
            sys.modules,
            PLUGIN,
            SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "plugin.so"),  # type: ignore[arg-type]
        )
        patch.setattr(onnxruntime, "get_ep_devices", lambda: self.found)
        patch.setattr(onnxruntime, "register_execution_provider_library", self.register)

    def register(self, name: str, path: str) -> None:
        assert (name, path) == (RTX, "plugin.so")
        if self.error:
            raise self.error
        self.found = [SimpleNamespace(ep_name=RTX)] * self.devices


def test_plugin_of_tensorrt_rtx_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(UserError, match=r"NvTensorRTRTXExecutionProvider is not in .*trimvlm\[ort-rtx\]"):
        check_provider(onnxruntime, RTX)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "finds no GPU that it runs on"),
        (RuntimeError("libcuda.so.1: cannot open\nmore"), r"does not load \(libcuda.so.1: cannot open\);"),
    ],
)
def test_plugin_without_a_gpu(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, error: Exception | None, message: str
) -> None:
    Plugin(monkeypatch, 0, error)
    with pytest.raises(UserError, match=message), open_backend(files, provider=RTX):
        pass


def test_plugin_with_a_gpu_gets_its_device_and_options(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = Plugin(monkeypatch, 1)
    given: list[Any] = []
    options = SimpleNamespace(
        add_session_config_entry=lambda *pair: None,
        add_provider_for_devices=lambda *each: given.append(each),
    )
    session = SimpleNamespace(get_providers=lambda: [RTX, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda path, options: session)
    for _ in range(2):  # the library is registered once
        assert create_session(onnxruntime, files["decoder"], options, RTX, 0) is session
    assert given[0] == (plugin.found, {"device_id": "0", "enable_cuda_graph": "0"})
