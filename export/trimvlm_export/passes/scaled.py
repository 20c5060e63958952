"""Queries that are scaled before their attention: for ONNX Runtime's CPU kernel.

The kernel scales scores as it makes them, and its product of one row is fast only where nothing scales the
result. So the queries of tokens after the prompt are scaled first. Pieces of a prompt (`causal`) have many
rows, which gain nothing, and stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from trimvlm_export.passes.causal import PIECES


def scale_queries(model: ir.Model) -> int:
    """Scales the queries (float32 [1, H, R, C]) of every Attention outside of pieces before it, in place.

    Returns:
        How many are changed.
    """
    scales: dict[float, ir.Value] = {}
    found = [node for node in RecursiveGraphIterator(model.graph) if _scale(node) != 1.0]
    for node in found:
        queries, result, scale = node.inputs[0], node.outputs[0], _scale(node)
        if scale not in scales:
            scales[scale] = _initializer(model.graph, scale)
        product = ir.node("Mul", [queries, scales[scale]], name=f"{result.name}.queries")
        scaled = product.outputs[0]  # its own name: in a branch it must be none of those outside
        assert queries is not None and node.graph is not None
        scaled.name, scaled.type, scaled.shape = product.name, queries.type, queries.shape
        node.graph.insert_before(node, [product])
        node.replace_input_with(0, scaled)
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
    return len(found)


def _scale(node: ir.Node) -> float:
    """What a node scales the scores of its queries with; 1.0 also where it would gain nothing by another."""
    if node.op_type != "Attention" or node.graph is None or str(node.graph.name).startswith(PIECES):
        return 1.0
    queries = node.inputs[0]
    if queries is None or queries.dtype != ir.DataType.FLOAT or queries.shape is None:
        return 1.0
    size = queries.shape[-1]
    return node.attributes.get_float("scale", size**-0.5) if isinstance(size, int) else 1.0


def _initializer(graph: ir.Graph, scale: float) -> ir.Value:
    name = f"scale.{scale:.9g}"
    made = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([]),
        const_value=ir.tensor(np.array(scale, np.float32), name=name),
    )
    graph.register_initializer(made)
    return made
