"""Products and what stands beside them in one operator each, for ONNX Runtime.

With few bits a token is short, and each of its hundreds of nodes costs microseconds. Keys, values and queries
of the same rows become one product, whose matrices lie together in the store, and a Split. A residual and the
norm that reads it become ONNX Runtime's own operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, NodeProto, helper, numpy_helper

from trimvlm_engines.quantizing.store import Blocked, Store
from trimvlm_engines.rewriting import replace_nodes

CONTRIB = "com.microsoft"
PRODUCT = "MatMulNBits"


def merge_products(graph: GraphProto, store: Store) -> list[Blocked]:
    """Makes one Gemm of those of a group of the store that read the same rows, in place.

    Returns:
        The matrices that they read now: several of the store as one.
    """
    constant = {tensor.name for tensor in graph.initializer}
    found: list[Blocked] = []
    made: dict[int, list[NodeProto]] = {}  # by the number of the node in whose place they are
    gone: set[int] = set()
    for group in store.groups:
        for first in _gemms(graph, group[0], constant):
            numbers, rows = [first], graph.node[first].input[0]
            for matrix in group[1:]:
                same = [n for n in _gemms(graph, matrix, constant) if graph.node[n].input[0] == rows]
                if (number := next((n for n in same if n not in gone), None)) is None:
                    break
                numbers.append(number)
            biased = {len(graph.node[number].input) > 2 for number in numbers}
            if len(numbers) > 1 and len(biased) == 1:
                parts = group[: len(numbers)]
                matrix = store.joined(parts)
                nodes = [graph.node[number] for number in numbers]
                made[min(numbers)] = _merged(graph, matrix, parts, nodes)
                gone |= {*numbers}
                found.append(matrix)
    kept: list[NodeProto] = []
    for number, node in enumerate(graph.node):
        kept += made.get(number, []) if number in gone else [node]
    replace_nodes(graph, kept)
    return found


def _gemms(graph: GraphProto, matrix: Blocked, constant: set[str]) -> list[int]:
    """Numbers of the nodes that multiply with a matrix and add nothing but a bias."""
    return [
        number
        for number, node in enumerate(graph.node)
        if node.op_type == "Gemm" and node.input[1] == matrix.name and constant.issuperset(node.input[2:])
    ]


def _merged(
    graph: GraphProto, matrix: Blocked, parts: Sequence[Blocked], nodes: Sequence[NodeProto]
) -> list[NodeProto]:
    """A product with `matrix`, which is all the `parts`, and what its result is split into."""
    gemm, made = NodeProto(), []
    gemm.CopyFrom(nodes[0])
    gemm.input[1], gemm.output[0] = matrix.name, f"{nodes[0].output[0]}.merged"
    gemm.name = gemm.output[0]
    if len(gemm.input) > 2:
        biases = [node.input[2] for node in nodes]
        gemm.input[2] = f"{nodes[0].output[0]}.bias"
        made = [helper.make_node("Concat", biases, [gemm.input[2]], name=gemm.input[2], axis=0)]
    widths = [part.rows for part in parts]
    sizes = f"widths.{'.'.join(map(str, widths))}"
    if sizes not in {tensor.name for tensor in graph.initializer}:
        graph.initializer.append(numpy_helper.from_array(np.array(widths), sizes))
    outputs = [node.output[0] for node in nodes]
    split = helper.make_node(
        "Split", [gemm.output[0], sizes], outputs, name=f"{nodes[0].output[0]}.split", axis=1
    )
    return [*made, gemm, split]


def add_in_norms(graph: GraphProto) -> int:
    """Lets the norm of a residual add a product to it, in place.

    Returns:
        How many Adds are gone.
    """
    products = {node.output[0] for node in graph.node if node.op_type == PRODUCT}
    constant = {tensor.name for tensor in graph.initializer}
    norms: dict[str, NodeProto] = {}
    for node in graph.node:
        if node.op_type == "RMSNormalization":
            norms.setdefault(node.input[0], node)
    nodes: list[NodeProto] = []
    gone: set[str] = set()
    for node in graph.node:
        norm = norms.get(node.output[0]) if node.op_type == "Add" else None
        if norm and products.intersection(node.input) and not constant.intersection(node.input):
            nodes.append(_norm(node, norm))
            gone.add(norm.output[0])
        elif node.output[0] not in gone:
            nodes.append(node)
    replace_nodes(graph, nodes)
    return len(gone)


def _norm(add: NodeProto, norm: NodeProto) -> NodeProto:
    options = {each.name: helper.get_attribute_value(each) for each in norm.attribute}
    return helper.make_node(
        "SkipSimplifiedLayerNormalization",
        [*add.input, norm.input[1]],
        [norm.output[0], "", "", add.output[0]],
        name=norm.output[0],
        domain=CONTRIB,
        epsilon=options.get("epsilon", 1e-5),
    )
