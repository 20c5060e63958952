"""Caches that grow in place: the fused lowering for a library that writes new rows where the old ones lie.

The fused decoder makes each cache anew: past and new rows, put one after the other. Here a cache is a buffer
with room for more rows than it has; `TensorScatter` writes the new ones behind the old ones, and nothing is
copied where the library is given the same memory for input and output. Attention masks the room that is left.

In a branch, what reads a cache, with its new rows or without, and is not a layer's attention of cached keys
to cached values, is given a copy of the filled rows. A layer whose attention reads other rows than it caches,
or whose keys something else reads outside of branches, keeps its copies. Operators are of opset 24, from
which on there is `TensorScatter`.

Shapes: G key/value heads, B rows of the buffer, P rows in it, R new rows, C head size, S = P + R.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from trimvlm.backends.caches import CACHE, KINDS, PAST_ROWS
from trimvlm_export.passes.branches import number, place

OPSET = 24


def to_in_place(model: ir.Model) -> tuple[int, ...]:
    """Changes the caches of a fused decoder in place.

    Returns:
        The layers whose caches grow in place; none: the model is as it was.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    layers = [int(name.split(".")[1]) for name in inputs if name.startswith("past_key.")]
    found = [layer for layer in layers if all(_concat(graph, inputs, kind, layer) for kind in KINDS)]
    padded: dict[ir.Value, ir.Value] = {}
    for layer in found:
        rows = ir.Value(
            name=f"{PAST_ROWS}.{layer}", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1])
        )
        graph.inputs.append(rows)
        for kind in KINDS:
            past = inputs[f"past_{kind}.{layer}"]
            past.name = f"{CACHE}_{kind}.{layer}"
            assert past.shape is not None
            buffer = str(past.shape[2]).replace("past", "buffer")  # one size for each budget
            past.shape = ir.Shape([*past.shape[:2], buffer, *past.shape[3:]])
            _scatter(graph, past, rows)
        _mask(graph, inputs[f"past_key.{layer}"], padded)
    if found:
        model.graph.opset_imports[""] = OPSET
        graph.sort()
    return tuple(found)


def _concat(graph: ir.Graph, inputs: dict[str, ir.Value], kind: str, layer: int) -> ir.Node | None:
    """What appends a layer's new rows to its past, if outside of branches that is all that reads the past but
    its length, and attention is all that reads the result."""
    past = inputs[f"past_{kind}.{layer}"]
    users = [use.node for use in past.uses() if use.node.graph is graph]
    appends = [node for node in users if node.op_type != "Shape"]
    if len(appends) != 1 or appends[0].op_type != "Concat" or len(appends[0].inputs) != 2:
        return None
    node = appends[0]
    present = node.outputs[0]
    outside = [use.node for use in present.uses() if use.node.graph is graph]
    attentions = [use.node for use in present.uses() if _in_place(use.node)]
    same = present.is_graph_output() and present.name == f"present_{kind}.{layer}" and node.inputs[0] is past
    sizes = all(_is_row_count(user) for user in users if user is not node)
    masked = all(len(each.inputs) > 3 and each.inputs[3] is not None for each in attentions)
    return node if same and sizes and masked and attentions and {*outside} <= {*attentions} else None


def _in_place(node: ir.Node) -> bool:
    """Whether it is the attention of a layer's cached keys to its cached values."""
    read = [str(value.name) for value in node.inputs[1:3] if value is not None]
    return node.op_type == "Attention" and all(
        name.startswith(f"present_{kind}.") for kind, name in zip(KINDS, read, strict=True)
    )


def _is_row_count(node: ir.Node) -> bool:
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return (
        node.op_type == "Shape"
        and start is not None
        and end is not None
        and (start.as_int(), end.as_int()) == (2, 3)
    )


def _scatter(graph: ir.Graph, past: ir.Value, rows: ir.Value) -> None:
    """Writes new rows into the buffer `past`; its number of rows is `rows`."""
    for use in list(past.uses()):
        if use.node.op_type == "Shape" and use.node.graph is graph:
            ir.convenience.replace_all_uses_with(use.node.outputs[0], rows)
            graph.remove(use.node, safe=True)
    (use,) = (use for use in past.uses() if use.node.graph is graph)
    present, new = use.node.outputs[0], use.node.inputs[1]
    assert new is not None
    _fill_branches(graph, past, lambda _: rows)
    tape = Tape()
    written = tape.op("TensorScatter", [past, new, rows], {"axis": 2})
    ir.convenience.replace_nodes_and_values(
        graph, use.node, [use.node], list(tape.nodes), [present], [written]
    )
    written.shape = past.shape
    _fill_branches(graph, written, lambda tape: tape.op("Add", [rows, _size(tape, new, 2)]))


def _fill_branches(graph: ir.Graph, buffer: ir.Value, count: Callable[[Tape], ir.Value]) -> None:
    """Gives branches the filled rows of a buffer, where they read a cache.

    Args:
        count: makes the number of these rows, int64 [1].
    """
    read = [use for use in buffer.uses() if not _in_place(use.node) and use.node.graph is not graph]
    for inner in {use.node.graph for use in read}:
        assert inner is not None and buffer.shape is not None
        tape, mine = Tape(), [use for use in read if use.node.graph is inner]
        rows = count(tape)
        if not all(_is_row_count(use.node) for use in mine):
            filled = tape.op("Slice", [buffer, number(graph, 0), rows, number(graph, 2)])
            filled.type, filled.shape = buffer.type, ir.Shape([*buffer.shape[:2], None, *buffer.shape[3:]])
        for position, node in enumerate(tape.nodes):
            node.name = node.outputs[0].name = f"{inner.name}.{buffer.name}.{position}"
        inner.insert_before(inner[0], list(tape.nodes))
        for use in mine:
            if _is_row_count(use.node):
                ir.convenience.replace_all_uses_with(use.node.outputs[0], rows)
                inner.remove(use.node, safe=True)
            else:
                use.node.replace_input_with(use.idx, filled)


def _mask(graph: ir.Graph, cache: ir.Value, padded: dict[ir.Value, ir.Value]) -> None:
    """Gives the attention that reads a cache a mask as wide as the buffer. Layers of one mask have buffers of
    one size: they cache the same rows."""
    (scatter,) = (use.node for use in cache.uses() if use.node.op_type == "TensorScatter")
    for use in [use for use in scatter.outputs[0].uses() if _in_place(use.node)]:
        mask = use.node.inputs[3]
        assert mask is not None and mask.shape is not None and len(mask.shape) == 2
        if mask not in padded:
            tape = Tape()
            room = tape.op("Sub", [_size(tape, cache, 2), _size(tape, mask, 1)])
            zeros = tape.initializer(ir.tensor(np.zeros(3, np.int64), name=f"pad.{len(padded)}"))
            widths = tape.op("Concat", [zeros, room], {"axis": 0})
            no = tape.initializer(ir.tensor(np.zeros((), np.bool_), name=f"hidden.{len(padded)}"))
            padded[mask] = tape.op("Pad", [mask, widths, no])
            padded[mask].dtype = ir.DataType.BOOL
            before = place(graph, use.node)
            assert before is not None
            graph.insert_before(before, list(tape.nodes))
            for value in (zeros, no):
                graph.register_initializer(value)
        use.node.replace_input_with(3, padded[mask])


def _size(tape: Tape, value: ir.Value, axis: int) -> ir.Value:
    size = tape.op("Shape", [value], {"start": axis, "end": axis + 1})
    size.dtype, size.shape = ir.DataType.INT64, ir.Shape([1])
    return size
