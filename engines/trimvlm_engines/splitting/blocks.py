"""A decoder graph in blocks of layers: graphs that give the same outputs, run one after the other.

What a later block reads of an earlier one is an output here and an input there: the residual stream, and the
masks and tables that layers share. Shapes are no such values: their arithmetic is repeated in each block that
needs it, because libraries do it on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx
from onnx import ValueInfoProto

from trimvlm.backends.blocks import CARRIED
from trimvlm.errors import UserError
from trimvlm_engines.splitting.boundaries import assign


def cut(model: onnx.ModelProto, layers: int) -> list[onnx.ModelProto]:
    """Graphs of at most `layers` layers each, in the order in which they run.

    Inputs and outputs of the whole graph keep their names; each is one of the blocks that need or make it.
    Weights are referenced by every block that reads them.

    Raises:
        UserError: a value between two blocks is of unknown type.
    """
    graph = model.graph
    parts = _Parts(graph, assign(graph, layers))
    types = _Types(graph)
    return [_block(model, parts, types, number) for number in range(parts.count)]


@dataclass
class _Parts:
    """What each block holds: numbers of its nodes, and names of its inputs and outputs."""

    graph: onnx.GraphProto
    block: list[int | None]
    nodes: list[list[int]] = field(init=False)
    taken: list[list[str]] = field(init=False)
    given: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.maker = {name: n for n, node in enumerate(self.graph.node) for name in node.output}
        self.count = 1 + max(number for number in self.block if number is not None)
        self.nodes = [self._with_arithmetic(number) for number in range(self.count)]
        read = [{name for n in nodes for name in self.graph.node[n].input} for nodes in self.nodes]
        inputs = [value.name for value in self.graph.input]
        read[0] |= set(inputs) - set().union(*read)  # what no node reads is an input all the same
        made = [name for node in self.graph.node for name in node.output]
        self.taken = [
            [
                *(name for name in inputs if name in names),
                *(name for name in made if name in names and self._before(name, number)),
            ]
            for number, names in enumerate(read)
        ]
        later = {name for names in self.taken for name in names}
        outputs = [value.name for value in self.graph.output]
        self.given = [
            [name for name in (*outputs, *made) if self.block[self.maker[name]] == number and name in wanted]
            for number in range(self.count)
            for wanted in [{*outputs, *later}]
        ]
        self.given = [list(dict.fromkeys(names)) for names in self.given]

    def _with_arithmetic(self, number: int) -> list[int]:
        """A block's nodes in the graph's order, with the arithmetic that leads to their inputs."""
        found = {n for n, block in enumerate(self.block) if block == number}
        to_do = list(found)
        while to_do:
            for name in self.graph.node[to_do.pop()].input:
                n = self.maker.get(name)
                if n is not None and self.block[n] is None and n not in found:
                    found.add(n)
                    to_do.append(n)
        return sorted(found)

    def _before(self, name: str, number: int) -> bool:
        block = self.block[self.maker[name]]
        return block is not None and block < number


class _Types:
    """Types of the values at a block's ends. Sizes that are equal have one name in all blocks."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        ports = [*graph.input, *graph.output]
        self.named = {value.name for value in ports}
        self.known = {value.name: value for value in (*graph.value_info, *ports)}
        self.sizes: dict[str, str] = {}
        self.unnamed = 0

    def rename(self, names: Iterable[str], carried: Iterable[str]) -> list[str]:
        """`names` with those of `carried` values as blocks call them."""
        moved = {name for name in carried if name not in self.named}
        return [CARRIED + name if name in moved else name for name in names]

    def of(self, name: str) -> ValueInfoProto:
        """Type of an input or output of a block."""
        value = ValueInfoProto()
        if name not in self.known or not self.known[name].type.tensor_type.HasField("shape"):
            raise UserError(
                f"the graph does not say the type of {name}, where it would be cut; export it again"
            )
        value.CopyFrom(self.known[name])
        if name in self.named:
            return value
        value.name = CARRIED + name
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                said = dim.dim_param or f"{name}.{self.unnamed}"
                self.unnamed += 1
                dim.dim_param = self.sizes.setdefault(said, f"carried_{len(self.sizes)}")
        return value


def _block(model: onnx.ModelProto, parts: _Parts, types: _Types, number: int) -> onnx.ModelProto:
    made = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    made.graph.name = f"{model.graph.name}.{number}"
    carried = {*parts.taken[number], *parts.given[number]}
    for n in parts.nodes[number]:
        node = made.graph.node.add()
        node.CopyFrom(model.graph.node[n])
        node.input[:] = types.rename(node.input, carried)
        node.output[:] = types.rename(node.output, carried)
    made.graph.input.extend(types.of(name) for name in parts.taken[number])
    made.graph.output.extend(types.of(name) for name in parts.given[number])
    read = {name for node in made.graph.node for name in node.input}
    made.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in read)
    return made
