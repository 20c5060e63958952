"""What every rewriting of an ONNX graph begins and ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trimvlm.errors import UserError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def read_graph(path: Path) -> ModelProto:
    """A graph without its weights.

    Raises:
        UserError: onnx is not installed.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        raise UserError(
            "limits.lm_head_columns, limits.layers_per_engine, weights and padded need the package onnx; pip "
            "install onnx, or leave them out of the target"
        ) from None
    return onnx.load(str(path), load_external_data=False)


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
            if each.type == each.GRAPH:
                yield from _read(each.g.node)
