"""What differs between TensorRT 10.3 to 11 and TensorRT-RTX. Nothing else asks for a version or a name.

Which names each version has was read in NVIDIA's own Python bindings (tests/data/tensorrt_names.json):

    since         what
    10.3          progress monitor, version-compatible and stripped plans, refitting from ONNX, TF32
    10.14         Attention, taken apart where its layers allow it
    by 10.16      plans are streamed out instead of held in memory
    11.0          every network is strongly typed; weak types, and tools' flags about them, are gone
    RTX           no timing cache, no version-compatible plans; compute capabilities; plans without a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimvlm.target import PlanOptions, numbers


def trtexec_types_weakly(version: str) -> bool:
    """Whether NVIDIA's tool needs a flag for a strongly typed network, e.g. of version `10.3.0`."""
    return numbers(version)[0] < 11


def create_network(trt: Any, builder: Any) -> Any:
    """A strongly typed network: asked for before 11, the only kind from 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def allow_decomposition(trt: Any, network: Any) -> None:
    """Marks every Attention decomposable. The parser hands out plain layers; the class is theirs to set."""
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # absent before 10.14, as is the operator
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True


def set_options(trt: Any, config: Any, options: PlanOptions) -> None:
    """Sets a Target's `plan` options; precision lives in the graph, so TF32 is always off."""
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # with the very same weights, so nothing is lost


def set_compute_capability(trt: Any, config: Any, compute_capability: str) -> bool:
    """Builds for a GPU that need not be there (TensorRT-RTX); False where the version does not know it."""
    found = getattr(trt.ComputeCapability, "SM" + compute_capability.replace(".", ""), None)
    if found is None:
        return False
    config.num_compute_capabilities = 1
    config.set_compute_capability(found, 0)
    return True


def serialize(
    trt: Any, builder: Any, network: Any, config: Any, write: Callable[[bytes | memoryview], int]
) -> bool:
    """Builds; streams where the version can, as the plan in memory costs half the weights more.

    Returns:
        False where the builder refused; its log says why.

    Raises:
        OSError: of `write`.
    """
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        return plan is not None and bool(write(memoryview(plan)))
    failure: list[OSError] = []

    class Stream(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:  # an exception must not cross the library's own frames
                return write(data)
            except OSError as error:
                failure.append(error)
                return 0

    done = builder.build_serialized_network_to_stream(network, config, Stream())
    if failure:
        raise failure[0]
    return bool(done)
