"""Attention of one row in one operator: for ONNX Runtime's CPU, where every query head has a key head.

A token after the prompt is one row, which sees every row that its layer has cached. ONNX Runtime's own
`GroupQueryAttention` then does what ten operators do, and reads keys and values faster than `Attention` where
no two query heads share them (with grouped heads it is slower). It wants rows in the order of their
positions, which a prompt's are not: an `If` leaves those what they had.

Shapes: R rows, H heads, C head size, B rows of the buffer, P rows in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from trimvlm.backends.caches import CACHE, PAST_ROWS
from trimvlm.schedule import Schedule
from trimvlm_export.passes.branches import (
    number,
    only_several,
    place,
    put_first,
    read_outside,
    run_for_several,
)

CONTRIB = "com.microsoft"
MULTIPLE = 8  # of head sizes, which the operator asks for
INT32 = ir.DataType.INT32


def attend_to_one_row(model: ir.Model, schedule: Schedule, layers: tuple[int, ...]) -> int:
    """Gives those of the `layers` whose caches grow in place a way of their own for one row, in place, not
    that of `read_caches_for_one_row`.

    Returns:
        The number of layers that changed; none of a model with grouped heads, or with odd sizes of heads.
    """
    graph = model.graph
    if schedule.model.heads != schedule.model.kv_heads or schedule.model.head_dim % MULTIPLE:
        return 0
    found = [chain for layer in layers if _sees_all(schedule, layer) and (chain := _chain(graph, layer))]
    if found:
        made = _OneRow(graph, schedule)
        for chain in found:
            made.branch(chain)
        graph.sort()
        RemoveUnusedNodesPass()(model)  # masks of one row that no layer reads any more
        model.opset_imports[CONTRIB] = 1
    return len(found)


class _Chain(NamedTuple):
    """What a layer does between its products and the next.

    Attributes:
        products: queries, which may have fewer rows, keys and values, [R, H * C].
        tables: cosine and sine [1, R, C / 2] of queries, and of keys.
        nodes: all operators from here to `result`, in their order.
        result: [R, H * C].
        presents: keys and values of the cache.
        scale: of scores; None: the operator's default.
    """

    layer: int
    products: list[ir.Value]
    tables: list[list[ir.Value]]
    nodes: list[ir.Node]
    result: ir.Value
    presents: tuple[ir.Value, ir.Value]
    scale: float | None


def _sees_all(schedule: Schedule, layer: int) -> bool:
    """Whether a row after the prompt sees every cached one; what hides visual keys does so in the prompt."""
    return schedule.rows[layer].masked_by is None


def _chain(graph: ir.Graph, layer: int) -> _Chain | None:
    """Of a layer; None: it does something else."""
    outputs = {str(value.name): value for value in graph.outputs}
    keys, values = (outputs[f"present_{kind}.{layer}"] for kind in ("key", "value"))
    attention = next((use.node for use in keys.uses() if use.node.op_type == "Attention"), None)
    outer = place(graph, attention) if attention else None
    if outer is None:
        return None
    whole = outer if outer.op_type == "Attention" else outer.attributes["else_branch"].as_graph()[-1]
    turned, plain = ("RotaryEmbedding", "Transpose", "Reshape"), ("Transpose", "Reshape")
    ways = [
        _up(whole.inputs[0], turned),
        _up(keys, ("TensorScatter", *turned)),
        _up(values, ("TensorScatter", *plain)),
    ]
    end = _down(outer, plain)
    if not end or not all(ways):
        return None
    inner = {outer, *end, *(node for way in ways for node in way)}
    result = end[-1].outputs[0]
    if read_outside(graph, inner, {result, keys, values}):
        return None  # by a selection, or by anything else
    return _Chain(
        layer=layer,
        products=[_value(way[-1].inputs[0]) for way in ways],
        tables=[[_value(each) for each in way[-3].inputs[1:]] for way in ways[:2]],
        nodes=[node for node in graph if node in inner],
        result=result,
        presents=(keys, values),
        scale=whole.attributes.get_float("scale", 0.0) or None,
    )


def _up(value: ir.Value | None, operators: Sequence[str]) -> list[ir.Node]:
    """What made a value, backwards, if it is such operators; a cache's write comes to what is written."""
    found: list[ir.Node] = []
    for operator in operators:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != operator:
            return []
        found.append(node)
        value = node.inputs[1 if operator == "TensorScatter" else 0]
    return found


def _down(node: ir.Node, operators: Sequence[str]) -> list[ir.Node]:
    """What alone reads a node's result, if it is such operators."""
    found: list[ir.Node] = []
    for operator in operators:
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or uses[0].node.op_type != operator:
            return []
        node = uses[0].node
        found.append(node)
    return found


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


class _OneRow:
    """What branches of several layers share: how many rows are cached."""

    def __init__(self, graph: ir.Graph, schedule: Schedule) -> None:
        self.graph, self.model = graph, schedule.model
        self.cached = {row.layer: row.cached for row in schedule.rows}
        self.inputs = {str(value.name): value for value in graph.inputs}
        self.lengths: dict[int, tuple[ir.Value, ir.Value]] = {}

    def branch(self, chain: _Chain) -> None:
        """Puts a layer's operators into one branch, and the one operator into the other."""
        kept, name = [chain.result, *chain.presents], f"several.{chain.layer}"
        nodes = [each for node in chain.nodes for each in only_several(self.graph, node)]
        run_for_several(self.graph, nodes, kept, self._in_one(chain), name)

    def _in_one(self, chain: _Chain) -> ir.Graph:
        heads, size, tape = self.model.heads, self.model.head_dim, Tape()
        rows = [
            tape.op("Reshape", [each, number(self.graph, 1, -1, heads * size)]) for each in chain.products
        ]
        for position, tables in enumerate(chain.tables):
            rows[position] = tape.op("RotaryEmbedding", [rows[position], *tables], {"num_heads": heads})
        pasts = [self.inputs[f"{CACHE}_{kind}.{chain.layer}"] for kind in ("key", "value")]
        found, *presents = tape.op_multi_out(
            "GroupQueryAttention",
            [*rows, *pasts, *self._lengths(chain.layer)],
            {"num_heads": heads, "kv_num_heads": heads} | ({"scale": chain.scale} if chain.scale else {}),
            domain=CONTRIB,
            num_outputs=3,
        )
        result = tape.op("Reshape", [found, number(self.graph, -1, heads * size)])
        found.type = chain.result.type  # ONNX does not know the operator's results
        for made, value in zip((result, *presents), (chain.result, *chain.presents), strict=True):
            made.type, made.shape = value.type, value.shape
        for position, node in enumerate(tape.nodes):
            for output, value in enumerate(node.outputs):
                value.name = node.name = f"one.{chain.layer}.{position}.{output}"
        return ir.Graph([], [result, *presents], nodes=list(tape.nodes), name=f"one.{chain.layer}")

    def _lengths(self, layer: int) -> tuple[ir.Value, ir.Value]:
        """Number of the row among a layer's keys, int32 [1], and how many these are, int32 []."""
        cached = self.cached[layer]
        if cached not in self.lengths:
            tape, past = Tape(), self.inputs[f"{PAST_ROWS}.{layer}"]
            last = tape.op("Cast", [past], {"to": INT32.value})
            count = tape.op("Add", [past, number(self.graph, 1)])
            count = tape.op("Cast", [tape.op("Squeeze", [count])], {"to": INT32.value})
            last.dtype, last.shape = INT32, ir.Shape([1])
            count.dtype, count.shape = INT32, ir.Shape([])
            put_first(self.graph, tape, f"keys.{cached}")
            self.lengths[cached] = last, count
        return self.lengths[cached]
