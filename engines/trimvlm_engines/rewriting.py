"""What every rewriting of an ONNX graph ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnx import AttributeProto, GraphProto, NodeProto


def replace_nodes(graph: GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Makes `nodes` the graph's own, in place; initialisers that none of them reads are dropped."""
    del graph.node[:]
    graph.node.extend(nodes)
    read = {*_read(nodes)}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _read(nodes: Sequence[NodeProto]) -> Iterator[str]:
    """Names that nodes read, those of their branches included."""
    for node in nodes:
        yield from node.input
        for each in node.attribute:
            if each.type == AttributeProto.GRAPH:
                yield from _read(each.g.node)
