"""What every rewriting of an ONNX graph ends with."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto, NodeProto


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Makes `nodes` the graph's own, in place; initialisers that none of them reads are dropped."""
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
