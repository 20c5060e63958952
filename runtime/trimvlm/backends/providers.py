"""Execution providers of ONNX Runtime: whether one is there, how a session gets it, what it leaves the CPU.

ONNX Runtime falls back to the CPU where a provider is missing or does not start. Here that is an error.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError

CPU, CUDA, RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"

# Sources: onnxruntime.ai, CUDA execution provider; nvidia.github.io/TensorRT-RTX-EP-ABI, provider options.
OPTIONS = {
    CUDA: {
        "use_tf32": "0",  # float32 is float32; cuDNN's convolutions heed only NVIDIA_TF32_OVERRIDE=0
        "arena_extend_strategy": "kSameAsRequested",  # instead of the next power of two
        "cudnn_conv_algo_search": "HEURISTIC",  # the one convolution of a tower is not worth trying them all
    },
    RTX: {"enable_cuda_graph": "0"},  # shapes change from run to run
}
INSTALL = {
    CUDA: "pip uninstall onnxruntime, then pip install 'trimvlm[ort-gpu]': both are the module onnxruntime",
    RTX: "pip install 'trimvlm[ort-rtx]', without onnxruntime-gpu, which is another module of the same name",
}


def check_provider(ort: Any, provider: str) -> None:
    """Refuses a provider that the installed ONNX Runtime does not have.

    Args:
        ort: the module onnxruntime.

    Raises:
        UserError: naming those that it has, and the package to install.
    """
    available = ort.get_available_providers()
    if provider in available or (provider == RTX and _plugin() is not None):
        return
    raise UserError(
        f"{provider} is not in onnxruntime {ort.__version__}, which has {', '.join(available)}; "
        f"{INSTALL[provider]}"
    )


def create_session(ort: Any, path: Path, options: Any, provider: str, device: int) -> Any:
    """An InferenceSession of a graph on a provider.

    Args:
        options: SessionOptions, of this session alone.
        device: number of the GPU.

    Raises:
        UserError: the provider does not start, or runs no node of the graph.
    """
    if provider == CPU:
        return ort.InferenceSession(path, options, providers=[CPU])
    given = {"device_id": str(device), **OPTIONS[provider]}
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider in ort.get_available_providers():
        session = ort.InferenceSession(path, options, providers=[(provider, given), CPU])
    else:
        options.add_provider_for_devices(_plugin_devices(ort), given)
        session = ort.InferenceSession(path, options)
    if provider not in session.get_providers():
        raise UserError(
            f"{path}: {provider} did not start, and onnxruntime would run the graph on the CPU; its log says "
            "why, often a library of CUDA or cuDNN that is missing (trimvlm doctor)"
        )
    left = nodes_on_cpu(session, provider)
    if left is not None and not left.elsewhere:
        raise UserError(f"{path}: {provider} takes no node of this graph; use the target ort-cpu")
    return session


class Placement(Counter[str]):
    """Operators of the nodes that run on the CPU, with their numbers.

    Attributes:
        elsewhere: nodes, or what became of them, on the provider.
    """

    elsewhere = 0

    def __str__(self) -> str:
        """`MatMul 1, Shape 3`."""
        return ", ".join(f"{operator} {count}" for operator, count in sorted(self.items()))


def nodes_on_cpu(session: Any, provider: str) -> Placement | None:
    """What a session leaves to the CPU; None where ONNX Runtime (before 1.24) does not tell."""
    if provider == CPU or not hasattr(session, "get_provider_graph_assignment_info"):
        return None
    placement = Placement()
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        if part.ep_name == CPU:
            placement.update(node.op_type for node in nodes)
        else:
            placement.elsewhere += len(nodes)
    return placement


def _plugin() -> Any:
    """The package that holds TensorRT-RTX's provider as a library of its own; None where it is not there."""
    try:
        import onnxruntime_ep_nv_tensorrt_rtx as plugin
    except ImportError:
        return None
    return plugin


def _plugin_devices(ort: Any) -> list[Any]:
    plugin = _plugin()
    name = plugin.get_ep_name()

    def devices() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == name]

    if not devices():
        try:
            ort.register_execution_provider_library(name, plugin.get_library_path())
        except Exception as error:  # noqa: BLE001 the bindings' exceptions share no other base
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{RTX} does not load ({reason}); install NVIDIA's driver, or use the target ort-cpu"
            ) from None
    if not (found := devices()):
        raise UserError(
            f"{RTX} finds no GPU that it runs on (GeForce RTX 30 series or newer, with a driver for it); "
            "use the target ort-cpu"
        )
    return found
