"""The primitive lowering: the fused operators of opset 23 in opset 18's MatMul, Softmax and arithmetic.

For libraries that do not know `Attention`, `RMSNormalization` and `RotaryEmbedding` (TensorRT 10.3 on
JetPack 6). Every other operator of the traced graphs is the same in both operator sets; sums of integers are
computed in float32, since it is not certain that TensorRT 10.3 has them in int64.

Shapes: R query rows, S key rows, H heads, G key/value heads, C head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

OPSET = 18
LOWEST = float(np.finfo(np.float32).min)  # instead of minus infinity: finite in every backend


def to_primitive(model: ir.Model) -> ir.Model:
    """Replaces the fused operators in place; returns the model."""
    for node in list(model.graph):
        expand = EXPANSIONS.get(node.op_type)
        if expand is None:
            continue
        tape = Tape()
        result = expand(tape, node)
        if result is None:
            continue
        old = node.outputs[0]
        assert old.dtype is not None
        result.dtype, result.shape = old.dtype, old.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), [old], [result])
    model.graph.opset_imports[""] = OPSET
    return model


def rms_norm(tape: Tape, node: ir.Node) -> ir.Value:
    """x [R, D], weight [D]: statistics in float32."""
    x, weight = _inputs(node, 2)
    wide = _cast(tape, x, ir.DataType.FLOAT)
    square = tape.op("ReduceMean", [tape.op("Mul", [wide, wide]), _ints(tape, [-1])], {"keepdims": 1})
    epsilon = _float(tape, node.attributes["epsilon"].as_float())
    root = tape.op("Sqrt", [tape.op("Add", [square, epsilon])])
    normed = tape.op("Div", [wide, root])
    if x.dtype != ir.DataType.FLOAT:
        assert x.dtype is not None
        normed = tape.op("Cast", [normed], {"to": x.dtype.value})
    return tape.op("Mul", [normed, weight])


def rope(tape: Tape, node: ir.Node) -> ir.Value:
    """x [1, H, R, C], cos and sin [1, R, C/2]; the halves of C are rotated."""
    x, cos, sin = _inputs(node, 3)
    size = x.shape[3] if x.shape is not None else None
    assert isinstance(size, int)
    half = size // 2
    first, second = (
        tape.op("Slice", [x, _ints(tape, [start]), _ints(tape, [start + half]), _ints(tape, [3])])
        for start in (0, half)
    )
    cos, sin = (tape.op("Unsqueeze", [table, _ints(tape, [1])]) for table in (cos, sin))
    low = tape.op("Sub", [tape.op("Mul", [first, cos]), tape.op("Mul", [second, sin])])
    high = tape.op("Add", [tape.op("Mul", [second, cos]), tape.op("Mul", [first, sin])])
    return tape.op("Concat", [low, high], {"axis": 3})


def attention(tape: Tape, node: ir.Node) -> ir.Value:
    """q [1, H, R, C], k and v [1, G, S, C], visible bool [R, S]; softmax in float32."""
    q, k, v, visible = _inputs(node, 4)
    assert q.shape is not None and k.shape is not None
    heads, groups, size = q.shape[1], k.shape[1], q.shape[3]
    assert isinstance(heads, int) and isinstance(groups, int) and isinstance(size, int)
    k, v = (_repeat(tape, value, heads // groups, [1, heads, -1, size]) for value in (k, v))
    given = node.attributes.get("scale")
    scale = _float(tape, given.as_float() if given else size**-0.5)
    keys = tape.op("Transpose", [_cast(tape, k, ir.DataType.FLOAT)], {"perm": [0, 1, 3, 2]})
    logits = tape.op("MatMul", [tape.op("Mul", [_cast(tape, q, ir.DataType.FLOAT), scale]), keys])
    masked = tape.op("Where", [visible, logits, _float(tape, LOWEST)])
    weights = tape.op("Softmax", [masked], {"axis": -1})
    if v.dtype not in (None, ir.DataType.FLOAT):
        weights = tape.op("Cast", [weights], {"to": v.dtype.value})  # type: ignore[union-attr]
    return tape.op("MatMul", [weights, v])


def integer_sum(tape: Tape, node: ir.Node) -> ir.Value | None:
    """Counts of rows, exact in float32; None: the sum is none of integers."""
    if node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.INT64:
        return None  # over some axes or over all
    data, axes = _inputs(node, 2)
    kept = {"keepdims": node.attributes.get_int("keepdims", 1)}
    total = tape.op("ReduceSum", [tape.op("Cast", [data], {"to": ir.DataType.FLOAT.value}), axes], kept)
    return tape.op("Cast", [total], {"to": ir.DataType.INT64.value})


EXPANSIONS: dict[str, Callable[[Tape, ir.Node], ir.Value | None]] = {
    "Attention": attention,
    "ReduceSum": integer_sum,
    "RMSNormalization": rms_norm,
    "RotaryEmbedding": rope,
}


def _inputs(node: ir.Node, count: int) -> list[ir.Value]:
    values = [value for value in node.inputs if value is not None]
    assert len(values) == count, f"{node.name}: {len(values)} inputs, not {count}"
    return values


def _repeat(tape: Tape, value: ir.Value, times: int, shape: list[int]) -> ir.Value:
    """[1, G, S, C] -> [1, G * times, S, C]: each key/value head serves `times` query heads."""
    if times == 1:
        return value
    one = tape.op("Unsqueeze", [value, _ints(tape, [2])])
    repeated = tape.op("Expand", [one, _ints(tape, [1, 1, times, 1, 1])])
    result = tape.op("Reshape", [repeated, _ints(tape, shape)])
    assert value.dtype is not None
    result.dtype = value.dtype
    return result


def _cast(tape: Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return value if value.dtype == dtype else tape.op("Cast", [value], {"to": dtype.value})


def _ints(tape: Tape, values: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(values, np.int64))})


def _float(tape: Tape, value: float) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.float32))})
