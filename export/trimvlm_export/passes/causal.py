"""Attention that leaves out what causality hides: for ONNX Runtime's CPU kernel, which computes all pairs.

Visual rows are in the order of their positions, so an early one sees no later one. In a prompt their queries
are cut into pieces, and each is given the visual keys up to its own end and all text keys: of many pieces
half the scores of visual rows with each other are never made, and only one piece's are in memory. The last
piece, text rows included, reads the whole cache. An `If` leaves the tokens after the prompt one attention.
Where rows lose weights after the softmax, visual rows have an attention of their own, which is cut; its last
piece has one text row, whose result is thrown away.

Shapes: R rows of the stream, N visual ones among them (the first), P past rows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from trimvlm.accounting import attention_pieces
from trimvlm.backends.caches import PAST_ROWS
from trimvlm.schedule import Row, Schedule
from trimvlm_export.passes.branches import number, place

END = np.iinfo(np.int64).max
PIECES = "pieces."  # names of branches begin so


def attend_in_pieces(model: ir.Model, schedule: Schedule, layers: tuple[int, ...]) -> int:
    """Cuts up attention in place, in those of the `layers` whose caches grow in place that have enough rows.

    Returns:
        The number of layers that changed.
    """
    made = [layer for layer in layers if attention_pieces(schedule, schedule.rows[layer]) > 1]
    if made:
        pieces = _Pieces(model.graph, schedule)
        for layer in made:
            pieces.cut(layer)
        model.graph.sort()
    return len(made)


class _Pieces:
    """What pieces of several layers share: numbers, places of the cuts, pieces of masks."""

    def __init__(self, graph: ir.Graph, schedule: Schedule) -> None:
        self.graph, self.schedule = graph, schedule
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.outputs = {str(value.name): value for value in graph.outputs}
        self.cuts: dict[int, list[ir.Value]] = {}
        self.masks: dict[tuple[ir.Value, int], tuple[ir.Value, list[ir.Value]]] = {}

    def cut(self, layer: int) -> None:
        """Replaces a layer's attention, or that of its visual rows."""
        row, attention = self.schedule.rows[layer], self._attention(layer)
        mask, old, graph = attention.inputs[3], attention.outputs[0], attention.graph
        outer = place(self.graph, attention)
        assert mask is not None and isinstance(graph, ir.Graph) and outer is not None
        tape = Tape()
        cuts = self.cuts.get(row.live) or self._cuts(tape, row.live, attention_pieces(self.schedule, row))
        there, masks = self.masks.get((mask, row.live)) or self._masks(tape, mask, row, cuts)
        self.graph.insert_before(outer, list(tape.nodes))
        branches = {
            "then_branch": _graph(f"{PIECES}{layer}", self._in_pieces(attention, cuts, masks)),
            "else_branch": _graph(f"whole.{layer}", [_again(attention)]),
        }
        made = Tape()
        result = made.op("If", [there], branches)
        result.type, result.shape = old.type, old.shape
        ir.convenience.replace_nodes_and_values(
            graph, attention, [attention], list(made.nodes), [old], [result]
        )

    def _attention(self, layer: int) -> ir.Node:
        """Of all rows, or in a branch where they lose weights of the visual ones, which come first."""
        keys = self.outputs[f"present_key.{layer}"]
        outer = place(self.graph, next(use.node for use in keys.uses() if use.node.op_type == "Attention"))
        node = outer
        if outer is not None and outer.op_type == "If":
            node = outer.attributes["then_branch"].as_graph().outputs[0].producer()
        while node is not None and node.op_type != "Attention":
            (first, *_) = node.inputs
            node = first.producer() if first is not None else None
        assert node is not None
        return node

    def _cuts(self, tape: Tape, live: int, pieces: int) -> list[ir.Value]:
        """Where each piece ends among the visual rows, int64 [1] each; the last is N."""
        rows = tape.op("Shape", [self.inputs["visual"]], {"start": 0, "end": 1})
        if live != self.schedule.visual_tokens:  # images times those that are left of each
            images = tape.op("Div", [rows, number(self.graph, self.schedule.visual_tokens)])
            rows = tape.op("Mul", [images, number(self.graph, live)])
        made = [
            tape.op("Div", [tape.op("Mul", [rows, number(self.graph, cut)]), number(self.graph, pieces)])
            for cut in range(1, pieces)
        ]
        self.cuts[live] = [*made, rows]
        return self.cuts[live]

    def _masks(
        self, tape: Tape, mask: ir.Value, row: Row, cuts: list[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Whether there are visual rows and no past; the mask of each piece."""
        plain = _inside(mask, "Pad", 0)
        made, start, count = [], number(self.graph, 0), cuts[-1]
        for end in cuts[:-1]:
            rows = self._slice(tape, plain, start, end, 0)
            seen = self._slice(tape, rows, number(self.graph, 0), end, 1)
            text = self._slice(tape, rows, count, number(self.graph, END), 1)
            made.append(tape.op("Concat", [seen, text], {"axis": 1}))
            start = end
        made.append(self._slice(tape, mask, start, number(self.graph, END), 0))
        past = self.inputs[f"{PAST_ROWS}.{row.layer}"]
        some = tape.op("Greater", [count, number(self.graph, 0)])
        there = tape.op("And", [some, tape.op("Equal", [past, number(self.graph, 0)])])
        self.masks[mask, row.live] = tape.op("Squeeze", [there]), made
        return self.masks[mask, row.live]

    def _in_pieces(self, attention: ir.Node, cuts: list[ir.Value], masks: list[ir.Value]) -> list[ir.Node]:
        tape, end = Tape(), number(self.graph, END)
        read = [value for value in attention.inputs[1:3] if value is not None]
        new = [_inside(value, "TensorScatter", 1) for value in read]  # without a past that is all
        queries = attention.inputs[0]
        assert queries is not None
        text = [self._slice(tape, each, cuts[-1], end, 2) for each in new]
        made, start = [], number(self.graph, 0)
        for piece, mask in enumerate(masks):
            stop = cuts[piece] if piece < len(masks) - 1 else end
            query = self._slice(tape, queries, start, stop, 2)
            shown = read
            if piece < len(masks) - 1:
                shown = [
                    tape.op(
                        "Concat", [self._slice(tape, each, number(self.graph, 0), stop, 2), rest], {"axis": 2}
                    )
                    for each, rest in zip(new, text, strict=True)
                ]
            made.append(tape.op("Attention", [query, *shown, mask], attention.attributes))
            start = stop
        tape.op("Concat", made, {"axis": 2})
        return list(tape.nodes)

    def _slice(self, tape: Tape, value: ir.Value, start: ir.Value, stop: ir.Value, axis: int) -> ir.Value:
        return tape.op("Slice", [value, start, stop, number(self.graph, axis)])


def _inside(value: ir.Value, operator: str, number: int) -> ir.Value:
    """An input of the operator that made a value; the value itself if another one did."""
    node = value.producer()
    found = node.inputs[number] if node is not None and node.op_type == operator else value
    assert found is not None
    return found


def _again(node: ir.Node) -> ir.Node:
    return ir.node(node.op_type, node.inputs, attributes=node.attributes)


def _graph(name: str, nodes: list[ir.Node]) -> ir.Graph:
    """A branch. Its values have names of their own: it sees the values outside by theirs."""
    for position, node in enumerate(nodes):
        node.name = node.outputs[0].name = f"{name}.{position}"
    return ir.Graph([], [nodes[-1].outputs[0]], nodes=nodes, name=name)
