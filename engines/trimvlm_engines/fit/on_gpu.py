"""Memory on a GPU, as `trimvlm.backends.plan_backend` takes it. None of it was measured on one.

A plan has its buffers set apart for the largest shapes that it was built for, whatever is asked. Past and
present keys and values are two buffers; activations are one for all plans. What TensorRT-RTX's builder says
of its plans is in docs/fit.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from trimvlm.schedule import Schedule
from trimvlm.target import Target
from trimvlm_engines.fit import live, plan_size, sizes
from trimvlm_engines.fit.arena import Sum
from trimvlm_engines.fit.graph import Graph, Node, Sized
from trimvlm_engines.fit.memory import MIB, Memory, Piece, decodes, kv_layers
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject
from trimvlm_engines.parts import Part

# A CUDA context, the library and Python.
LIBRARIES = 600 * MIB
# A Jetson's memory is the system's, too: without a desktop.
SYSTEM = 800 * MIB
# Of each plan beside its values: what TensorRT-RTX 1.7.1's builder says of graphs with next to none.
WORKSPACE = 8 * MIB


def memory(subject: Subject, target: Target, value_bytes: int) -> Memory:
    """What answers need, up to the target's limits.

    Args:
        value_bytes: of a key's or value's element.
    """
    graphs, parts, schedule, _ = subject
    limits = target.limits
    caches = kv_layers(
        schedule,
        Request(images=limits.images, text=limits.text, new_tokens=limits.new_tokens),
        value_bytes,
    )
    plans = _plans(graphs, schedule, target)
    apart = {role: set_apart(graph, parts[role], schedule) + WORKSPACE for role, graph in graphs.items()}
    busiest = max(apart, key=lambda role: apart[role])
    said = f"for {limits.images} images, {limits.text} text rows, {limits.new_tokens} new tokens"
    pieces = (
        *([Piece(name="system", bytes=SYSTEM, basis="assumed", note="no desktop")] if target.l4t else []),
        Piece(name="runtime and libraries", bytes=LIBRARIES, basis="assumed", note="with a CUDA context"),
        *(
            Piece(name=f"{role} engine", bytes=size, basis="fitted", note="weights and kernels")
            for role, size in plans.items()
        ),
        Piece(name="KV cache", bytes=sum(caches), basis="counted", note=said),
        Piece(name="KV cache, second copy", bytes=sum(caches), basis="counted", note="past and present"),
        Piece(name="activations", bytes=apart[busiest], basis="simulated", note=f"of the {busiest} engine"),
    )
    total = sum(piece.bytes for piece in pieces)
    before = sum(size for role, size in plans.items() if not decodes(role))
    return Memory(
        pieces=pieces,
        opening=total,
        taking_turns=total - min(before, sum(plans.values()) - before),
        at_once=tuple(sorted(_at_once(graphs, caches, apart), key=lambda piece: -piece.bytes)),
    )


def set_apart(graph: Graph, part: Part, schedule: Schedule) -> int:
    """Bytes that a plan sets apart for what lies between its inputs and outputs, without the workspace."""
    space, sized = Sum(), graph.sized(sizes.largest(part.ranges))
    attention = [node for node in sized.nodes if node.op == "Attention"]
    wide = any(sized.tensors[node.inputs[0]].item == 4 for node in attention)
    scratch = live.scores_twice if wide else live.no_scratch
    live.run(sized, graph.outputs, space, scratch, outside=lambda name: name.startswith("present_"))
    if not attention:
        return space.resident
    lasting, each = (0, _most(scratch, sized)) if wide else _masks(attention, sized)
    # A layer whose queries are a slice of unknown length shares its scratch with none (TensorRT-RTX 1.7.1).
    sliced = {row.layer for row in schedule.rows if row.attends and row.query != "live"}
    alone = len(sliced & {node.layer for node in attention})
    return space.resident + lasting + alone * each


def _plans(graphs: Mapping[str, Graph], schedule: Schedule, target: Target) -> dict[str, int]:
    blocks = [role for role in graphs if decodes(role)]
    of_blocks = plan_size.of_decoder([graphs[role] for role in blocks], schedule)
    found = {role: plan_size.of_graph(graph) for role, graph in graphs.items() if role not in blocks}
    for role, size in zip(blocks, of_blocks, strict=True):
        # Two ranges of shapes store the weights twice (TensorRT-RTX 1.7.1).
        found[role] = size + (graphs[role].weight_bytes if target.ranges == "split" else 0)
    return found


def _most(scratch: live.Scratch, sized: Sized) -> int:
    return max(sum(scratch(node, sized.tensors)) for node in sized.nodes)


def _masks(attention: list[Node], sized: Sized) -> tuple[int, int]:
    """For dedicated kernels: masks in the graph's precision, which stay; and what a layer alone has of them,
    with its queries and output."""
    masks = {node.inputs[3]: sized.tensors[node.inputs[3]].bytes for node in attention}
    queries = [sized.tensors[node.inputs[0]] for node in attention]
    item = queries[0].item
    return item * sum(masks.values()), item * max(masks.values()) + 2 * max(query.bytes for query in queries)


def _at_once(
    graphs: Mapping[str, Graph], caches: tuple[int, ...], apart: Mapping[str, int]
) -> Iterator[Piece]:
    """What is had in one piece: an engine's weights (reported of TensorRT 10.3: docs/jetson.md), its
    activations, the keys or values of a layer."""
    for role, graph in graphs.items():
        for name, weight in graph.weights.items():
            yield Piece(name=f"weight {name}", bytes=weight.bytes, basis="counted")
        yield Piece(name=f"weights of the {role} engine", bytes=graph.weight_bytes, basis="assumed")
        yield Piece(name=f"activations of the {role} engine", bytes=apart[role], basis="assumed")
    yield Piece(name="keys or values of a layer", bytes=max(caches) // 2, basis="counted")
