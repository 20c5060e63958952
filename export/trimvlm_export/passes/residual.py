"""Residuals that a matrix product adds itself: `Gemm` takes as C what an `Add` put on its result.

ONNX Runtime's CPU kernel adds to C as it multiplies, so the rows are not read and written once more.
"""

from __future__ import annotations

import onnx_ir as ir


def add_in_products(model: ir.Model) -> int:
    """Takes every Add of a residual [R, D] to a product without bias [R, D] into the Gemm, in place.

    Returns:
        How many Adds are gone.
    """
    graph, gone = model.graph, 0
    for add in list(graph):
        gemm = next((node for value in add.inputs if (node := _product(add, value))), None)
        if gemm is None:
            continue
        (residual,) = (value for value in add.inputs if value is not gemm.outputs[0])
        made = ir.node(
            "Gemm", [*gemm.inputs, residual], attributes=gemm.attributes, name=gemm.name, num_outputs=1
        )
        ir.convenience.replace_nodes_and_values(
            graph, add, [add, gemm], [made], [add.outputs[0]], [made.outputs[0]]
        )
        gone += 1
    return gone


def _product(add: ir.Node, value: ir.Value | None) -> ir.Node | None:
    """The Gemm of a matrix that `add` alone reads, and that its other input has the width of."""
    if add.op_type != "Add" or value is None or (gemm := value.producer()) is None:
        return None
    shapes = [each.shape for each in add.inputs if each is not None]
    alone = gemm.op_type == "Gemm" and len(gemm.inputs) == 2 and len(list(value.uses())) == 1
    alone = alone and gemm.attributes.get_float("beta", 1.0) == 1.0  # what C is multiplied with
    matrices = len(shapes) == 2 and all(shape is not None and len(shape) == 2 for shape in shapes)
    if not alone or not matrices or value.is_graph_output():
        return None
    left, right = (shape[1] for shape in shapes if shape is not None)
    return gemm if isinstance(left, int) and left == right else None
