"""Selections that a run without visual rows goes round: for ONNX Runtime's CPU.

A token after the prompt has no visual rows, and a stage that ranks them has nothing to choose from. Traced,
it still scores all that a layer has cached, in dozens of operators, for an empty result. Here an `If` gives
that result at once; and where nothing but attention and branches then reads a layer's keys, their cache can
grow in place. What two stages share, as the text rows that rate, is made in every run.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from trimvlm_export.passes.branches import put_first, run_in_branch

RANKS, SELECTED = "ranks_rows", "selected."


def rank_only_visual_rows(model: ir.Model) -> int:
    """Makes the stages of a decoder rank rows only where there are visual ones, in place.

    Returns:
        The number of stages that changed.
    """
    graph = model.graph
    stages = [str(value.name) for value in graph.outputs if str(value.name).startswith(SELECTED)]
    changed = sum(_skip(graph, name.removeprefix(SELECTED)) for name in stages)
    if changed:
        graph.sort()
    return changed


def _skip(graph: ir.Graph, stage: str) -> bool:
    outputs = {str(value.name): value for value in graph.outputs}
    chosen, scores = _chosen(outputs[SELECTED + stage]), outputs[f"scores.{stage}"]
    if chosen is None:
        return False
    inner = _only_for(graph, {chosen, scores})
    if not {chosen.producer(), scores.producer()} <= {*inner}:
        return False
    tape = Tape()
    empty = [tape.op("Identity", [_empty(graph, value)]) for value in (chosen, scores)]
    for number, (made, value) in enumerate(zip(empty, (chosen, scores), strict=True)):
        made.name = tape.nodes[number].name = f"none.{stage}.{number}"
        made.type, made.shape = value.type, ir.Shape([0])
    other = ir.Graph([], empty, nodes=list(tape.nodes), name=f"none.{stage}")
    kept = [chosen, scores]
    run_in_branch(graph, inner, kept, other, f"ranked.{stage}", condition=_ranks_rows(graph))
    return True


def _chosen(selected: ir.Value) -> ir.Value | None:
    """Numbers [K] among the live rows of what a stage chose, int64."""
    gather = selected.producer()
    value = gather.inputs[1] if gather is not None and gather.op_type == "Gather" else None
    while value is not None and (node := value.producer()) is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value if value is not None and value.producer() is not None else None


def _only_for(graph: ir.Graph, results: set[ir.Value]) -> list[ir.Node]:
    """Nodes whose values are read on the way to `results` only, in the graph's order; none that reads a
    weight: quantising finds these outside of branches only."""
    found: set[ir.Node] = set()
    outputs = {*graph.outputs}
    for node in reversed(graph):
        if results.isdisjoint(node.outputs):
            users = {use.node for value in node.outputs for use in value.uses()}
            if not users or not users <= found or not outputs.isdisjoint(node.outputs):
                continue
        if not any(value and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs):
            found.add(node)
    return [node for node in graph if node in found]


def _ranks_rows(graph: ir.Graph) -> ir.Value:
    """Bool []: whether a run has visual rows."""
    found = next((value for node in graph for value in node.outputs if value.name == RANKS), None)
    if found is not None:
        return found
    (visual,) = (value for value in graph.inputs if value.name == "visual")
    tape = Tape()
    made = tape.op("Cast", [tape.op("Size", [visual])], {"to": ir.DataType.BOOL.value})
    made.name, made.dtype, made.shape = RANKS, ir.DataType.BOOL, ir.Shape([])
    put_first(graph, tape, RANKS)
    return made


def _empty(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """[0], an initializer of the graph, of a value's type."""
    assert value.dtype is not None
    name = f"none.{value.dtype.name.lower()}"
    if name not in graph.initializers:
        nothing = ir.tensor(np.empty(0, value.dtype.numpy()), name=name)
        made = ir.Value(name=name, type=value.type, shape=ir.Shape([0]), const_value=nothing)
        graph.register_initializer(made)
    return graph.initializers[name]
