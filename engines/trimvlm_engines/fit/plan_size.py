"""Bytes of a plan before it is built: every weight once, and kernels.

How many kernels there are depends on the layers that differ, hardly on their width. The figures were fitted
to plans of TensorRT-RTX 1.7.1 for SM 8.6, 8.9 and 12.0 in float32 and float16, of 0.5 MB to 1 GB of weights
(docs/fit.md). Classic TensorRT was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from trimvlm.schedule import Schedule
from trimvlm_engines.fit.graph import Graph

# Decoders, in bytes: each layer; each layer at whose input rows come or go; each selection; each kind of
# layer in which not all rows take part.
LAYER, CHANGE, SELECTION, KIND = 591_000, 998_000, 2_378_000, 6_873_000
# Other graphs: each graph, each node.
GRAPH, NODE = 2_041_000, 4_970

_EVERY_ROW = ("live", "live", "both", "both")


def of_decoder(graphs: Sequence[Graph], schedule: Schedule) -> list[int]:
    """Bytes of the plans of a decoder: one graph, or blocks of its layers."""
    rows = schedule.rows
    changes = sum(row.live != before.live for before, row in pairwise(rows))
    selections = len(schedule.stages) + len(schedule.skip_stages)
    kinds = {(row.query, row.ffn, row.execute, row.sublayers) for row in rows} - {_EVERY_ROW}
    kernels = LAYER * len(rows) + CHANGE * changes + SELECTION * selections + KIND * len(kinds)
    kernels += GRAPH * (len(graphs) - 1)
    return [graph.weight_bytes + kernels // len(graphs) for graph in graphs]


def of_graph(graph: Graph) -> int:
    """Bytes of the plan of a vision tower, projector or router."""
    return graph.weight_bytes + GRAPH + NODE * graph.nodes
