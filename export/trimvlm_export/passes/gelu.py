"""GELUs as ONNX Runtime looks for them: it makes one operator of the five or eight that they are written as.

torch's exporter writes x * (0.5 * (1 + f(x))), and ONNX Runtime's fusions look for (x * 0.5) * (1 + f(x)).
The result is the same to the bit, as 0.5 is a power of two.
"""

from __future__ import annotations

import onnx_ir as ir


def halve_inputs(model: ir.Model) -> int:
    """Moves the 0.5 of every GELU, exact or by tanh, to its input, in place.

    Returns:
        How many are changed.
    """
    return sum(_halve_input(node) for node in model.graph)


def _halve_input(node: ir.Node) -> bool:
    inner = _made_by(node, 1, "Mul") if node.op_type == "Mul" else None
    add = _made_by(inner, 1, "Add") if inner and len(inner.outputs[0].uses()) == 1 else None
    if inner is None or add is None or not (_made_by(add, 0, "Erf") or _made_by(add, 0, "Tanh")):
        return False
    x, half, rest = node.inputs[0], inner.inputs[0], inner.inputs[1]
    constant = half.const_value if half else None
    if constant is None or constant.size != 1 or constant.numpy().item() != 0.5:
        return False
    for each, values in ((inner, (x, half)), (node, (inner.outputs[0], rest))):
        for number, value in enumerate(values):
            each.replace_input_with(number, value)
    return True


def _made_by(node: ir.Node, number: int, operator: str) -> ir.Node | None:
    """What makes an input of a node, if it is such an operator."""
    value = node.inputs[number]
    made = value.producer() if value is not None else None
    return made if made is not None and made.op_type == operator else None
