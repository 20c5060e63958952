"""Copies of one decoder layer inside a traced graph, each with its own weights, past and present."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

LAYER = re.compile(r"^(layers\.|past_key\.|past_value\.|present_key\.|present_value\.)(\d+)(?=\.|$)")


@dataclass
class Layer:
    """One layer in a traced graph.

    Attributes:
        nodes: what it computes for itself, in the graph's order.
        before, after: the residual stream.
        reads: names of the weights that the nodes read, without the layer's number, sorted; another layer's
            with theirs.
    """

    nodes: list[ir.Node]
    before: ir.Value
    after: ir.Value
    reads: list[str]

    @classmethod
    def of(cls, graph: ir.Graph, ports: Mapping[str, ir.Value], number: int) -> Layer:
        """Layer `number`, whose residual streams are the ports `before.{number}` and `after.{number}`.

        Its own is what follows from the stream, from its weights and from its past, but not from the sizes of
        these: all layers that are alike have the same.
        """
        before, after = ports[f"before.{number}"], ports[f"after.{number}"]
        names = (f"present_key.{number}", f"present_value.{number}")
        leading = _leading([after, *(ports[name] for name in names if name in ports)], before)
        made: set[ir.Value | None] = set()
        nodes: list[ir.Node] = []
        for node in graph:  # in the order of computation
            from_outside = any(value is before or _of(value, number) for value in node.inputs)
            own = (from_outside and node.op_type != "Shape") or any(value in made for value in node.inputs)
            if own and node in leading:
                nodes.append(node)
                made.update(node.outputs)
        prefix = f"layers.{number}."
        return cls(nodes, before, after, sorted(name.removeprefix(prefix) for name in _weights(nodes)))

    def copy(
        self, graph: ir.Graph, before: ir.Value, own: int, number: int, made: dict[str, ir.Value]
    ) -> ir.Value:
        """Adds layer `number` on `before`; its inputs and outputs of the graph go into `made`.

        Returns:
            Its residual stream.
        """
        known: dict[ir.Value, ir.Value] = {self.before: before}

        def named(value: ir.Value) -> ir.Value:
            name = LAYER.sub(lambda found: f"{found[1]}{number}", str(value.name))
            return ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)

        def source(value: ir.Value | None) -> ir.Value | None:
            if value is None or value in known:
                return value and known[value]
            found = LAYER.match(str(value.name))
            if found and int(found[2]) == own and (value.is_graph_input() or value.is_initializer()):
                known[value] = named(value)
                if value.is_initializer():
                    graph.register_initializer(known[value])
                else:
                    made[str(known[value].name)] = known[value]
                return known[value]
            return value

        for node in self.nodes:
            copied = ir.Node(
                node.domain,
                node.op_type,
                [source(value) for value in node.inputs],
                node.attributes.values(),
                outputs=[self._output(value, number, named, made) for value in node.outputs],
                version=node.version,
                name=f"{node.name}.{number}",
            )
            known.update(zip(node.outputs, copied.outputs, strict=True))
            graph.append(copied)
        return known[self.after]

    def follow(self, before: ir.Value) -> None:
        """Makes the layer itself read `before`."""
        for node in self.nodes:
            for index, value in enumerate(node.inputs):
                if value is self.before:
                    node.replace_input_with(index, before)

    @staticmethod
    def _output(
        value: ir.Value, number: int, named: Callable[[ir.Value], ir.Value], made: dict[str, ir.Value]
    ) -> ir.Value:
        if value.is_graph_output() and LAYER.match(str(value.name)):
            made[str(named(value).name)] = found = named(value)
            return found
        sizes = [n if isinstance(n, int) else None for n in value.shape] if value.shape is not None else None
        shape = (
            None if sizes is None else ir.Shape(sizes)
        )  # without the sizes' names: they are the layer's own
        return ir.Value(name=f"{value.name}.{number}", type=value.type, shape=shape)


def _leading(values: Iterable[ir.Value], start: ir.Value) -> set[ir.Node]:
    """Nodes that lead to some values, but not those before `start`."""
    found: set[ir.Node] = set()
    open_ = list(values)
    while open_:
        value = open_.pop()
        node = None if value is start else value.producer()
        if node is not None and node not in found:
            found.add(node)
            open_ += [value for value in node.inputs if value is not None]
    return found


def _of(value: ir.Value | None, number: int) -> bool:
    """Whether it is a weight or the past of layer `number`."""
    if value is None or value.producer() is not None:
        return False
    found = LAYER.match(str(value.name))
    return found is not None and int(found[2]) == number


def _weights(nodes: Iterable[ir.Node]) -> set[str]:
    """Names of the layers' weights that nodes read."""
    read = (value for node in nodes for value in node.inputs if value is not None and value.is_initializer())
    return {name for name in (str(value.name) for value in read) if name.startswith("layers.")}


def rename(graph: ir.Graph, change: Callable[[str], str]) -> None:
    """Renames inputs, outputs and initialisers; new names may be others' old ones."""
    initializers = [graph.initializers.pop(name) for name in list(graph.initializers)]
    for value in [*graph.inputs, *graph.outputs, *initializers]:
        value.name = change(str(value.name))
    for value in initializers:
        graph.register_initializer(value)
