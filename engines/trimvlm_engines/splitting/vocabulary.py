"""The matrices with a row for each vocabulary entry in pieces: language model head and token embeddings.

A board that gives no gigabyte in one piece cannot hold them whole. Each piece is external data that points to
its rows of the same tensor, so no weight is copied, and every number is computed as before.

Shapes: V vocabulary, D width, T text rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from trimvlm_engines.rewriting import replace_nodes

LOGITS, IDS = "logits", "input_ids"


def split_vocabulary(model: onnx.ModelProto, rows: int) -> bool:
    """Splits the head and the embeddings of a decoder graph in place.

    The head's Gemm becomes one for each piece and a Concat of their columns. The embeddings' Gather becomes
    one for each piece, of ids moved into it; of them `Where` takes the right one.

    Args:
        rows: the most vocabulary entries of a piece.

    Returns:
        Whether anything was larger.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    used: set[str] = set()
    head = _head(graph)
    for node in graph.node:
        place = {"Gemm": 1, "Gather": 0}.get(node.op_type)
        weight = weights.get(node.input[place]) if place is not None else None
        mine = (weight.name == head if node.op_type == "Gemm" else node.input[1] == IDS) if weight else False
        if not mine or not weight or weight.dims[0] <= rows:
            nodes.append(node)
            continue
        pieces = list(_pieces(weight, rows))
        for piece in pieces:
            if piece.name not in used:
                used.add(piece.name)
                graph.initializer.append(piece)
        nodes += (_gemms if node.op_type == "Gemm" else _gathers)(node, pieces, graph)
    if not used:
        return False
    replace_nodes(graph, nodes)
    return True


def _head(graph: onnx.GraphProto) -> str | None:
    """Name of the weight of the Gemm that makes the logits."""
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(LOGITS)
    while node is not None and node.op_type == "Cast":
        node = makers.get(node.input[0])
    return node.input[1] if node is not None and node.op_type == "Gemm" else None


def _pieces(weight: TensorProto, rows: int) -> Iterator[TensorProto]:
    """External tensors of at most `rows` rows each that together are `weight` [V, D]."""
    count, width = weight.dims
    said = {entry.key: entry.value for entry in weight.external_data}
    stride = int(said["length"]) // count
    for start in range(0, count, rows):
        size = min(rows, count - start)
        piece = TensorProto(name=f"{weight.name}.{start}", data_type=weight.data_type, dims=[size, width])
        piece.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", said["location"]),
            ("offset", int(said.get("offset", 0)) + start * stride),
            ("length", size * stride),
        ):
            piece.external_data.add(key=key, value=str(value))
        yield piece


def _gemms(node: NodeProto, pieces: list[TensorProto], graph: onnx.GraphProto) -> list[NodeProto]:
    assert len(node.input) == 2 and {a.name: helper.get_attribute_value(a) for a in node.attribute}["transB"]
    (result,) = node.output
    made = []
    for piece in pieces:
        one = NodeProto()
        one.CopyFrom(node)
        one.input[1], one.name = piece.name, f"{result}.{piece.name}"
        one.output[0] = one.name
        made.append(one)
    columns = [one.output[0] for one in made]
    return [*made, helper.make_node("Concat", columns, [result], name=f"{result}.columns", axis=1)]


def _gathers(node: NodeProto, pieces: list[TensorProto], graph: onnx.GraphProto) -> list[NodeProto]:
    ids, (result,) = node.input[1], node.output
    made: list[NodeProto] = []

    def constant(name: str, value: int) -> str:
        if all(tensor.name != name for tensor in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        return name

    def add(kind: str, inputs: list[str], name: str) -> str:
        made.append(helper.make_node(kind, inputs, [name], name=name))
        return name

    found, start = "", 0
    for number, piece in enumerate(pieces):
        name, size = f"{result}.{piece.name}", piece.dims[0]
        first = constant(f"{name}.first", start)
        low = add(
            "Max", [add("Sub", [ids, first], f"{name}.moved"), constant("vocabulary.0", 0)], f"{name}.low"
        )
        within = add("Min", [low, constant(f"{name}.last", size - 1)], f"{name}.within")
        rows = add("Gather", [piece.name, within], f"{name}.rows")
        if number:
            reached = add("GreaterOrEqual", [ids, first], f"{name}.reached")
            column = add("Unsqueeze", [reached, constant("vocabulary.1", 1)], f"{name}.column")
            last = number == len(pieces) - 1
            found = add("Where", [column, rows, found], result if last else f"{name}.found")
        else:
            found = rows
        start += size
    return made
