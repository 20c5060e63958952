"""Operators that know no bfloat16 in their graph's operator set compute in float32 between casts.

Convolution and pooling take bfloat16 from opset 22 on; a graph for every target is of opset 18.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

BFLOAT16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen(model: ir.Model) -> ir.Model:
    """Puts the casts in place; returns the model. A graph without bfloat16 stays as it is."""
    opset = model.opset_imports[""]
    for node in list(model.graph):
        if any(value and value.dtype == BFLOAT16 for value in node.inputs) and not _takes(node, opset):
            _compute_wide(model, node)
    return model


def _takes(node: ir.Node, opset: int) -> bool:
    """Whether every bfloat16 input of a node may be one in this operator set."""
    formal = onnx.defs.get_schema(node.op_type, opset).inputs
    return all(
        value is None
        or value.dtype != BFLOAT16
        or "tensor(bfloat16)" in formal[min(number, len(formal) - 1)].types
        for number, value in enumerate(node.inputs)
    )


def _compute_wide(model: ir.Model, node: ir.Node) -> None:
    (old,), tape = node.outputs, Tape()
    inputs = [_cast(tape, x, FLOAT) if x and x.dtype == BFLOAT16 else x for x in node.inputs]
    wide = tape.op(node.op_type, inputs, node.attributes)
    wide.dtype, wide.shape = FLOAT, old.shape
    result = _cast(tape, wide, BFLOAT16)
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), [old], [result])


def _cast(tape: Tape, value: ir.Value, kind: ir.DataType) -> ir.Value:
    result = tape.op("Cast", [value], {"to": kind})
    result.dtype, result.shape = kind, value.shape
    return result
