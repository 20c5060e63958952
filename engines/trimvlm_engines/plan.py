"""Graph -> plan, over the API that classic TensorRT and TensorRT-RTX share; `trt` is either module.

Precision lives in the graph: the network is always strongly typed and TF32 is off, so that a float32 graph
is computed in float32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from trimvlm.errors import UserError
from trimvlm_engines.shapes import ShapeRange

log = logging.getLogger(__name__)

Attention = Literal["fused", "decomposed"]

# What the builder says where it has no kernel for an Attention and may not take it apart.
NO_KERNEL = "is_decomposable"


class Sink(Protocol):
    """Where a plan goes."""

    def write(self, data: bytes | memoryview) -> int: ...


class NoFusedAttentionError(Exception):
    """The builder has no dedicated kernel for an Attention of this graph."""


def build_plan(
    trt: Any,
    graph: Path,
    ranges: Mapping[str, ShapeRange],
    sink: Sink,
    *,
    attention: Attention,
    configure: Callable[[Any], Callable[[], None] | None],
) -> None:
    """Builds one plan.

    Args:
        trt: the library's module.
        graph: ONNX file; its external data is read from beside it.
        ranges: shape range of every input with a dynamic dimension.
        sink: receives the plan, in pieces where the library can stream.
        attention: `fused` insists on dedicated kernels for the graph's Attention operators; `decomposed` lets
            the builder take them apart.
        configure: sets what is particular to the library on an IBuilderConfig; what it returns is called
            after a successful build.

    Raises:
        UserError: the graph does not parse (naming the node) or the builder refuses it.
        NoFusedAttentionError: `fused` was asked for and there is no kernel.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph}: {_parse_errors(parser) or logger.said()}")
    if attention == "decomposed":
        _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    finish = configure(config)
    config.add_optimization_profile(_shape_ranges(builder, network, ranges, graph))
    if not _serialize(trt, builder, network, config, sink):
        if NO_KERNEL in logger.said() and attention == "fused":
            raise NoFusedAttentionError
        raise UserError(f"{graph}: {trt.__name__} {trt.__version__} cannot build it: {logger.said()}")
    if finish:
        finish()


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name() or '?'} ({error.node_operator() or 'graph'}): {_one_line(error.desc())}"
        for error in errors[:3]
    )


def _one_line(message: str) -> str:
    """Without the lines about a missing CUDA driver: TensorRT-RTX builds without one."""
    return " ".join(" ".join(line for line in message.splitlines() if "catchCudaError" not in line).split())


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Marks every Attention decomposable. The parser hands out plain layers; the class is theirs to set."""
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)  # absent before 10.14, as is the operator
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True


def _shape_ranges(builder: Any, network: Any, ranges: Mapping[str, ShapeRange], graph: Path) -> Any:
    shapes = builder.create_optimization_profile()
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        dims = tuple(tensor.shape)
        if -1 not in dims:
            continue
        wanted = ranges.get(tensor.name)
        if wanted is None or not all(
            dim in (-1, low, high) and (dim == -1 or low == high)
            for dim, low, high in zip(dims, wanted.min, wanted.max, strict=True)
        ):
            said = "no shape range" if wanted is None else f"the range {wanted.min}..{wanted.max}"
            raise UserError(f"{graph}: input {tensor.name} {list(dims)} has {said}; export it again")
        shapes.set_shape(tensor.name, wanted.min, wanted.opt, wanted.max)
    return shapes


def _serialize(trt: Any, builder: Any, network: Any, config: Any, sink: Sink) -> bool:
    """Streams where the library can: the whole plan in memory costs half the weights more."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        plan = builder.build_serialized_network(network, config)
        return plan is not None and bool(sink.write(memoryview(plan)))
    failure: list[OSError] = []

    class Stream(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            try:  # an exception must not cross the library's own frames
                return sink.write(data)
            except OSError as error:
                failure.append(error)
                return 0

    done = builder.build_serialized_network_to_stream(network, config, Stream())
    if failure:
        raise failure[0]
    return bool(done)


def _logger(trt: Any) -> Any:
    """The library's log through `logging`; errors are also kept for the message of a failed build."""
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.INFO,
        trt.ILogger.Severity.ERROR: logging.INFO,
        trt.ILogger.Severity.WARNING: logging.INFO,
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)
            if severity in levels:
                log.log(levels[severity], "%s", message)

        def said(self) -> str:
            """The errors on one line."""
            lines = dict.fromkeys(_one_line(message) for message in self.errors)
            return "; ".join(line for line in lines if line) or "no reason given"

    return Logger()
