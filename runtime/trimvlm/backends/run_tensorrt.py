"""Classic TensorRT, 10.3 and newer: Jetson and data-centre GPUs.

No CUDA graph is captured. A captured graph replays one set of shapes and addresses, but in decoding the past
grows by a row per token (docs/decisions/0023-running-plans.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from trimvlm.backends.cuda import Cuda
from trimvlm.backends.plan_backend import PlanBackend
from trimvlm.backends.plan_library import PlanLibrary

INSTALL = (
    "TensorRT comes with JetPack 6.1 or newer (apt install python3-libnvinfer, a venv with "
    "--system-site-packages) or from NVIDIA's own package index (https://docs.nvidia.com/deeplearning/tensorrt)"
)


def open_backend(
    files: Mapping[str, Path],
    *,
    graphs: Mapping[str, Path] = MappingProxyType({}),
    version_compatible: bool = False,
    turns: bool | None = None,
) -> PlanBackend:
    """Makes the backend; device memory is taken by `with`.

    Args:
        files: role to plan.
        graphs: role to the ONNX graph that a plan without weights takes them from.
        version_compatible: some plans are; they hold code of the library, which is run.
        turns: whether the decoder's engine and the others take turns in device memory: each is loaded when
            it is needed, and the other dropped. None: where they do not fit together.

    Raises:
        UserError: TensorRT or the bindings of CUDA are missing or too old, or there is no GPU.
    """
    library = PlanLibrary("tensorrt", (10, 3), INSTALL, host_code=version_compatible)
    Cuda()
    return PlanBackend(files, library, graphs, turns)
