"""Parts of a decoder that run where a condition holds: an `If` around them, and another way where not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

SEVERAL = "several_rows"


def several_rows(graph: ir.Graph) -> ir.Value:
    """Bool []: whether a run is of several rows; one row is a token after the prompt, or a prompt of one."""
    found = next((value for node in graph for value in node.outputs if value.name == SEVERAL), None)
    if found is not None:
        return found
    tape, inputs = Tape(), {str(value.name): value for value in graph.inputs}
    counts = (tape.op("Shape", [inputs[name]], {"start": 0, "end": 1}) for name in ("input_ids", "visual"))
    made = tape.op("Squeeze", [tape.op("Greater", [tape.op("Add", [*counts]), number(graph, 1)])])
    made.name, made.dtype, made.shape = SEVERAL, ir.DataType.BOOL, ir.Shape([])
    put_first(graph, tape, SEVERAL)
    return made


def run_for_several(
    graph: ir.Graph, nodes: Sequence[ir.Node], kept: Sequence[ir.Value], other: ir.Graph, name: str
) -> None:
    """Makes nodes run where there are several rows, and `other` where there is one; see `run_in_branch`."""
    run_in_branch(graph, nodes, kept, other, name, condition=several_rows(graph))


def run_in_branch(
    graph: ir.Graph,
    nodes: Sequence[ir.Node],
    kept: Sequence[ir.Value],
    other: ir.Graph,
    name: str,
    *,
    condition: ir.Value,
) -> None:
    """Makes nodes run where a condition holds, and `other` where not, in place.

    Args:
        nodes: of the graph, in their order.
        kept: what of theirs is read elsewhere.
        other: gives as many values, which replace these.
        name: of the branch.
        condition: bool [].
    """
    names = [value.name for value in kept]
    node = ir.node("If", [condition], attributes={}, num_outputs=len(kept), name=f"{name}.if")
    for made, value in zip(node.outputs, kept, strict=True):
        made.type, made.shape = value.type, value.shape
    graph.insert_before(nodes[0], node)
    outputs = list(graph.outputs)
    for made, value in zip(node.outputs, kept, strict=True):
        for use in [use for use in value.uses() if place(graph, use.node) not in nodes]:
            use.node.replace_input_with(use.idx, made)
        for position, output in enumerate(outputs):
            if output is value:
                graph.outputs[position] = made
    for value, made, was in zip(kept, node.outputs, names, strict=True):
        value.name, made.name = f"{name}.{was}", was
    graph.remove(nodes)
    branches = {"then_branch": ir.Graph([], kept, nodes=nodes, name=name), "else_branch": other}
    for each, branch in branches.items():
        node.attributes[each] = ir.AttrGraph(each, branch)


def only_several(graph: ir.Graph, node: ir.Node) -> list[ir.Node]:
    """Takes an `If` of `run_for_several` away, in place.

    Returns:
        What it ran for several rows, in its place; of another node just that.
    """
    condition = node.inputs[0] if node.op_type == "If" else None
    if condition is None or condition.name != SEVERAL:
        return [node]
    then, other = (node.attributes[each].as_graph() for each in ("then_branch", "else_branch"))
    results, nodes = list(then.outputs), list(then)
    then.remove(nodes)
    other.outputs.clear()
    other.remove(list(other), safe=True)
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(list(node.outputs), results, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return nodes


def place(graph: ir.Graph, inner: ir.Node) -> ir.Node | None:
    """The node itself if it is the graph's, else the graph's `If` in whose branches it is, at any depth."""
    if inner.graph is graph:
        return inner
    return next((node for node in graph if any(place(each, inner) for each in _branches(node))), None)


def read_outside(graph: ir.Graph, nodes: Collection[ir.Node], kept: Collection[ir.Value]) -> bool:
    """Whether another of the nodes' values than those `kept` is read by anything but these nodes."""
    made = {value for node in nodes for value in node.outputs} - {*kept}
    if any(value.is_graph_output() for value in made):
        return True
    return any(place(graph, use.node) not in nodes for value in made for use in value.uses())


def number(graph: ir.Graph, *values: int) -> ir.Value:
    """int64 [n], an initializer of the graph."""
    name = f"number.{'.'.join(map(str, values))}"
    if name not in graph.initializers:
        made = ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(values)]),
            const_value=ir.tensor(np.array(values), name=name),
        )
        graph.register_initializer(made)
    return graph.initializers[name]


def put_first(graph: ir.Graph, tape: Tape, name: str) -> None:
    """Puts nodes at the beginning of the graph, named after `name`."""
    for position, node in enumerate(tape.nodes):
        value = node.outputs[0]
        node.name = value.name = value.name or f"{name}.{position}"
    graph.insert_before(graph[0], list(tape.nodes))


def _branches(node: ir.Node) -> list[ir.Graph]:
    return [each.as_graph() for each in node.attributes.values() if each.type == ir.AttributeType.GRAPH]
