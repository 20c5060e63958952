"""Graph -> plan, over the API that classic TensorRT and TensorRT-RTX share; `trt` is either module.

Precision lives in the graph: the network is always strongly typed and TF32 is off, so that a float32 graph
is computed in float32. What versions differ in is in `versions`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimvlm.backends.plan_library import make_logger, one_line
from trimvlm.bundle import Lowering
from trimvlm.errors import UserError
from trimvlm.target import PlanOptions
from trimvlm_engines import versions
from trimvlm_engines.library import Work
from trimvlm_engines.progress import Reports, interruptible, monitor
from trimvlm_engines.shapes import ShapeRange

log = logging.getLogger(__name__)

Attention = Literal["fused", "decomposed"]

# What the builder says where it has no kernel for an Attention and may not take it apart.
NO_KERNEL = "is_decomposable"


class Recipe(NamedTuple):
    """How a plan is built.

    Attributes:
        attention: `fused` insists on dedicated kernels for the graph's Attention operators; `decomposed` lets
            the builder take them apart.
        options: of the Target.
        configure: sets what is particular to the library on an IBuilderConfig; what it returns is called
            after a successful build.
    """

    attention: Attention
    options: PlanOptions
    configure: Callable[[Any], Callable[[], None] | None]


class NoFusedAttentionError(Exception):
    """The builder has no dedicated kernel for an Attention of this graph."""


def make_plan(trt: Any, work: Work, recipe: Recipe, lowering: Lowering) -> dict[str, Any]:
    """Builds one plan; where the builder has no dedicated kernel for an Attention, it is decomposed.

    Returns:
        What became of Attention, for the Engine's options.

    Raises:
        UserError, KeyboardInterrupt: as `build_plan`.
    """
    if lowering == "primitive":
        build_plan(trt, work, recipe)
        return {"attention": lowering}
    try:
        build_plan(trt, work, recipe)
    except NoFusedAttentionError:
        log.warning("%s: no fused attention kernel for this head size; decomposed", work.graph.name)
        recipe = recipe._replace(attention="decomposed")
        build_plan(trt, work, recipe)
    return {"attention": recipe.attention}


def build_plan(trt: Any, work: Work, recipe: Recipe) -> None:
    """Builds one plan into `work.sink`, in pieces where the library can stream.

    The parser maps the weights' file; nothing here reads them.

    Raises:
        UserError: the graph does not parse (naming the node) or the builder refuses it.
        NoFusedAttentionError: `fused` was asked for and there is no kernel.
        KeyboardInterrupt: Ctrl-C.
    """
    graph, sink = work.graph, work.sink
    assert sink is not None
    logger = make_logger(trt, _told)
    builder = trt.Builder(logger)
    network = versions.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise UserError(f"{graph}: {_parse_errors(parser) or logger.said()}")
    if recipe.attention == "decomposed":
        versions.allow_decomposition(trt, network)
    config = builder.create_builder_config()
    versions.set_options(trt, config, recipe.options)
    finish = recipe.configure(config)
    for ranges in work.phases or [work.ranges]:
        config.add_optimization_profile(_shape_ranges(builder, network, ranges, graph))
    with interruptible() as interrupt:
        reports = Reports(work.watch, interrupt)
        config.progress_monitor = watching = monitor(trt, reports)  # the library holds no reference to it
        built = versions.serialize(trt, builder, network, config, sink.write)
        del watching
    if reports.failure:
        raise reports.failure
    if not built:
        if NO_KERNEL in logger.said() and recipe.attention == "fused":
            raise NoFusedAttentionError
        raise UserError(f"{graph}: {trt.__name__} {trt.__version__} cannot build it: {logger.said()}")
    if finish:
        finish()


def _parse_errors(parser: Any) -> str:
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    return "; ".join(
        f"node {error.node_name() or '?'} ({error.node_operator() or 'graph'}): {_told(error.desc())}"
        for error in errors[:3]
    )


def _told(message: str) -> str:
    """On one line, without what is said of a missing CUDA driver: TensorRT-RTX builds without one."""
    return one_line("\n".join(line for line in message.splitlines() if "catchCudaError" not in line))


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
