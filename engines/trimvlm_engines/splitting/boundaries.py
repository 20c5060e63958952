"""Where a decoder graph is cut between blocks of layers: which block each node is in.

A node that reads weights or the past of a layer is in that layer's block. The nodes between the last of one
block and the first of the next could be in either; of all places in the graph's order the cut goes where the
least is carried over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import ValueInfoProto, helper

# Of the graph's inputs and weights, named as `trimvlm.bundle` and transformers do.
LAYER = re.compile(r"(?:layers|past_key|past_value)\.(\d+)(?:\.|$)")
ARITHMETIC = {
    *(
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "Div",
        "Gather",
        "Identity",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Reshape",
    ),
    *("Shape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
}
ROWS = 512  # what a varying size counts where costs are compared
UNKNOWN = 1 << 40  # bytes that a value of unknown type counts


def assign(graph: onnx.GraphProto, layers: int) -> list[int | None]:
    """Block of each node, numbered without gaps; None for what every block that needs it has: arithmetic with
    shapes, and what is made of constants alone.

    Args:
        layers: the most layers of a block.
    """
    nodes = _Nodes.of(graph, layers)
    block = list(nodes.latest)
    costs = {value.name: _cost(value) for value in graph.value_info} | {
        value.name: _cost(value) for value in graph.output
    }
    early: set[int] = set()
    for boundary in range(max(nodes.latest)):
        early |= {n for n, last in enumerate(nodes.latest) if last <= boundary}
        between = [
            n
            for n, first in enumerate(nodes.earliest)
            if first <= boundary and n not in early and not nodes.light[n]
        ]
        for n in _cheapest(nodes, between, early, costs):
            early.add(n)
            block[n] = boundary
    for n in reversed(range(len(block))):  # what reads no layer waits for its first reader
        if nodes.earliest[n] < 0 and nodes.readers[n]:
            block[n] = min(block[reader] for reader in nodes.readers[n])
    return [None if light else number for light, number in zip(nodes.light, block, strict=True)]


@dataclass
class _Nodes:
    """By number of a node: the first block that it can be in (-1: it depends on no layer) and the last one,
    whether it is arithmetic with shapes or constants, the nodes that it reads and those that read it."""

    graph: onnx.GraphProto
    earliest: list[int]
    latest: list[int]
    light: list[bool]
    read: list[list[int]]
    readers: list[list[int]]

    @classmethod
    def of(cls, graph: onnx.GraphProto, layers: int) -> _Nodes:
        maker = {name: n for n, node in enumerate(graph.node) for name in node.output}
        read = [[maker[name] for name in node.input if name in maker] for node in graph.node]
        readers: list[list[int]] = [[] for _ in graph.node]
        for n, sources in enumerate(read):
            for source in sources:
                readers[source].append(n)
        constant, light = _constant(graph, maker), _arithmetic(graph, maker)
        own: list[int] = []
        for n, node in enumerate(graph.node):
            named = [int(found[1]) // layers for name in node.input if (found := LAYER.match(name))]
            own.append(max([*named, *(own[source] for source in read[n] if constant[source])], default=-1))
        number = {
            old: new
            for new, old in enumerate(
                sorted({n for n, each in zip(own, light, strict=True) if n >= 0 and not each})
            )
        }
        own = [-1 if each else number.get(n, -1) for n, each in zip(own, light, strict=True)]
        earliest: list[int] = []
        for n, sources in enumerate(read):
            earliest.append(max([own[n], *(earliest[source] for source in sources)]))
        latest = list(earliest)
        for n in reversed(range(len(own))):
            if own[n] < 0:
                latest[n] = min((latest[reader] for reader in readers[n]), default=max(earliest[n], 0))
        return cls(graph, earliest, latest, light, read, readers)


def _arithmetic(graph: onnx.GraphProto, maker: Mapping[str, int]) -> list[bool]:
    """Which nodes compute with nothing but shapes and constants, or nothing but constants."""
    results = {value.name for value in graph.output}
    constants = {tensor.name for tensor in graph.initializer}
    light: list[bool] = []
    for node, alone in zip(graph.node, _constant(graph, maker), strict=True):
        known = all(light[maker[name]] if name in maker else name in constants for name in node.input if name)
        simple = alone or node.op_type == "Shape" or (node.op_type in ARITHMETIC and known)
        light.append(simple and not results & {*node.output})
    return light


def _constant(graph: onnx.GraphProto, maker: Mapping[str, int]) -> list[bool]:
    """Which nodes make something of weights alone, e.g. of codes what they stand for."""
    constants = {tensor.name for tensor in graph.initializer}
    found: list[bool] = []
    for node in graph.node:
        found.append(
            all(found[maker[name]] if name in maker else name in constants for name in node.input if name)
        )
    return found


def _cheapest(
    nodes: _Nodes, between: Sequence[int], early: set[int], costs: Mapping[str, int]
) -> Sequence[int]:
    """The first of the nodes `between` that go to the earlier block, so that the least is carried over.

    Of equal costs the longest beginning.
    """
    sources = {source for n in between for source in nodes.read[n] if not nodes.light[source]}
    touched = sorted(sources | set(between))
    best, found = None, 0
    before = set(early)
    for count in range(len(between) + 1):
        if count:
            before.add(between[count - 1])
        cost = sum(
            costs.get(name, UNKNOWN)
            for n in touched
            if n in before
            for name in nodes.graph.node[n].output
            if any(
                name in nodes.graph.node[reader].input and reader not in before for reader in nodes.readers[n]
            )
        )
        if best is None or cost <= best:
            best, found = cost, count
    return between[:found]


def _cost(value: ValueInfoProto) -> int:
    """Bytes, roughly."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return UNKNOWN
    size = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    for dim in kind.shape.dim:
        size *= dim.dim_value if dim.HasField("dim_value") else ROWS
    return size
