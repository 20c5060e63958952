"""A half-precision graph as a float32 graph whose results are rounded: one rounding after every operator.

That is what a device with float32 accumulators computes, whatever kernels it has. ONNX Runtime's CPU provider
runs it at the speed of float32, though it has next to no operators in bfloat16, and in float16 it rounds only
where it has a kernel.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

FLOAT, HALVES = ir.DataType.FLOAT, (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

# They move values and compute none.
MOVES = {
    *("Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape"),
    *("ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"),
}


def to_rounded(model: ir.Model) -> ir.Model:
    """Changes the graph in place; returns the model. The dtype of every value must be known.

    Weights stay as they are. Inputs and outputs become float32; inputs are rounded, too.
    """
    graph = model.graph
    for node in list(graph):
        for value in node.outputs:
            half = value.dtype
            assert half is not None, f"{value.name}: of unknown type"
            if half not in HALVES:
                continue
            value.dtype = FLOAT
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", FLOAT)
            if node.op_type not in MOVES:
                _replace(graph, value, half, FLOAT)
    for value in graph.inputs:
        half = value.dtype
        if half is not None and half in HALVES:
            value.dtype = FLOAT
            _replace(graph, value, half, FLOAT)
    for value in graph.initializers.values():
        if value.dtype in HALVES:
            _replace(graph, value, FLOAT)
    return model


def _replace(graph: ir.Graph, value: ir.Value, *kinds: ir.DataType) -> None:
    """Everything that reads a value, reads what a cast to each of `kinds` in turn makes of it."""
    tape, uses, made, name = Tape(), list(value.uses()), value, value.name
    for kind in kinds:
        made = tape.op("Cast", [made], {"to": kind})
        made.dtype, made.shape = kind, value.shape
    for user, number in uses:
        user.replace_input_with(number, made)
    if value.is_graph_output():
        graph.outputs[graph.outputs.index(value)] = made
        value.name, made.name = f"{name}.exact", name
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], tape.nodes)
    else:
        graph.insert_after(producer, tape.nodes)
