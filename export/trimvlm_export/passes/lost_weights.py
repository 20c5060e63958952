"""Attention with other values than the cache has, which one row goes round: for ONNX Runtime's CPU.

Where rows lose weights after the softmax (`mask: post_softmax`), a prompt's attention reads values made for
that (`Attended.output`). A token after the prompt loses no weight: an `If` lets it read the cache itself.

Shapes: H heads, Q query rows, C head size, S cached rows with the new ones.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from trimvlm.accounting import loses_weights
from trimvlm.schedule import Row, Schedule
from trimvlm_export.passes.branches import number, put_first, read_outside, run_for_several


def read_caches_for_one_row(model: ir.Model, schedule: Schedule) -> int:
    """Gives one row an attention of the cache itself, in layers whose prompt reads other values, in place.

    Returns:
        The number of layers that changed.
    """
    graph, masks = model.graph, dict[int, ir.Value]()
    changed = sum(_branch(graph, row, masks) for row in schedule.rows if _sees_all(schedule, row))
    if changed:
        graph.sort()
    return changed


def _sees_all(schedule: Schedule, row: Row) -> bool:
    """Whether a layer's prompt loses weights, and later rows see all that it caches."""
    return loses_weights(schedule, row) and row.masked_by is None and row.cached == row.live


def _branch(graph: ir.Graph, row: Row, masks: dict[int, ir.Value]) -> bool:
    outputs = {str(value.name): value for value in graph.outputs}
    keys, values = (outputs[f"present_{kind}.{row.layer}"] for kind in ("key", "value"))
    queries, result = _queries(graph, row.layer), _result(graph, row.layer)
    if queries is None or result is None:
        return False
    read = {queries, keys, values}
    inner = _between(graph, read, result)
    if not inner or read_outside(graph, inner, {result}):
        return False
    if row.cached not in masks:
        masks[row.cached] = _mask(graph, row)
    attention = ir.node("Attention", [queries, keys, values, masks[row.cached]], name=f"plain.{row.layer}")
    made = attention.outputs[0]
    made.name, made.type, made.shape = attention.name, result.type, result.shape
    other = ir.Graph([], [made], nodes=[attention], name=f"plain.{row.layer}")
    run_for_several(graph, inner, [result], other, f"losing.{row.layer}")
    return True


def _queries(graph: ir.Graph, layer: int) -> ir.Value | None:
    """Rotated queries [1, H, Q, C] of a layer."""
    node = _product(graph, f"layers.{layer}.self_attn.q_proj.weight")
    while node is not None and node.op_type in ("Gemm", "MatMul", "Add", "Reshape", "Transpose"):
        uses = list(node.outputs[0].uses())
        node = uses[0].node if len(uses) == 1 else None
    return node.outputs[0] if node is not None and node.op_type == "RotaryEmbedding" else None


def _result(graph: ir.Graph, layer: int) -> ir.Value | None:
    """What a layer's attention gives [1, H, Q, C]."""
    node, value = _product(graph, f"layers.{layer}.self_attn.o_proj.weight"), None
    for operator in ("Reshape", "Transpose"):
        value = node.inputs[0] if node is not None else None
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return None
    return node.inputs[0] if node is not None else None


def _product(graph: ir.Graph, weight: str) -> ir.Node | None:
    return next(
        (node for node in graph if any(value and value.name == weight for value in node.inputs)), None
    )


def _between(graph: ir.Graph, read: set[ir.Value], result: ir.Value) -> list[ir.Node]:
    """What makes `result` of the values `read`, in the graph's order."""
    makers: set[ir.Node] = set()
    values = [result]
    while values:
        node = values.pop().producer()
        if node is not None and node not in makers and not read & {*node.outputs}:
            makers.add(node)
            values.extend(value for value in node.inputs if value is not None)
    found, reached = [], set(read)
    for node in graph:
        if node in makers and not reached.isdisjoint(node.inputs):
            found.append(node)
            reached.update(node.outputs)
    return found


def _mask(graph: ir.Graph, row: Row) -> ir.Value:
    """bool [1, S] for one row after the past of a layer, which sees all."""
    past = next(value for value in graph.inputs if value.name == f"past_key.{row.layer}")
    tape = Tape()
    rows = tape.op("Add", [tape.op("Shape", [past], {"start": 2, "end": 3}), number(graph, 1)])
    shape = tape.op("Concat", [number(graph, 1), rows], {"axis": 0})
    yes = ir.Value(
        name=f"seen.{row.cached}",
        type=ir.TensorType(ir.DataType.BOOL),
        shape=ir.Shape([1]),
        const_value=ir.tensor(np.ones(1, np.bool_), name=f"seen.{row.cached}"),
    )
    graph.register_initializer(yes)
    mask = tape.op("Expand", [yes, shape])
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1, None])
    put_first(graph, tape, f"seen.{row.cached}")
    return mask
