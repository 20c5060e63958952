"""Memory on ONNX Runtime's CPU provider, as a Session opens it. docs/fit.md compares it with measurements.

The decoder's weights that matrices are multiplied with are copied once into the layout of the kernels, and
the mapped original is let go, and so are codes; tables, and floats before the decoder, stay mapped. Scratch
memory comes from an arena per session, which keeps what it once had; the vision session gives it back after
each image.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from trimvlm.accounting import attention_pieces, loses_weights
from trimvlm.backends.caches import KINDS, ROOM
from trimvlm.bundle import Bundle
from trimvlm.rules import ValueInfluence, reads
from trimvlm_engines.fit import live
from trimvlm_engines.fit.arena import Arena
from trimvlm_engines.fit.memory import MIB, Memory, Piece, decodes, kv_layers
from trimvlm_engines.fit.outcomes import Shape
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject

# Python, numpy, Pillow, tokenizers, ONNX Runtime and two open sessions without weights: measured on x86-64
# Linux with Python 3.11 and ONNX Runtime 1.31, private pages and those of shared libraries' files. Of these a
# process has up to 15 MB more where the kernel keeps the files in larger pieces.
PRIVATE, LIBRARIES = 29 * MIB, 44 * MIB
# What an answer adds to that: image codecs, pixels, text.
ANSWERING = 8 * MIB
# A tokenizer in memory over the bytes of its file.
TOKENIZER = 8
# What Linux maps around a row that is looked up in a mapped table.
LOOK_UP = 64 << 10


def memory(bundle: Bundle, subject: Subject, request: Request, value_bytes: int) -> Memory:
    """What answers to a request need.

    Args:
        value_bytes: of a key's or value's element.
    """
    scratch = {role: _arena(role, subject, request) for role in subject.graphs}
    layers = kv_layers(subject.schedule, request, value_bytes)
    grown = [layers[number] for number in subject.in_place]  # not in the arena
    model = subject.schedule.model
    room = (
        ROOM * len(grown) * 2 * model.kv_heads * model.head_dim * value_bytes if request.new_tokens > 1 else 0
    )
    runtime = PRIVATE + TOKENIZER * bundle.manifest.files[bundle.manifest.text.tokenizer].bytes
    every = [(name, weight) for graph in subject.graphs.values() for name, weight in graph.weights.items()]
    weights = sum(weight.bytes for _, weight in every if not weight.looked_up)
    packed = [role for role, part in subject.parts.items() if decodes(role) or part.store]
    copies = {
        name: weight.bytes
        for role in packed
        for name, weight in subject.graphs[role].weights.items()
        if not weight.looked_up
    }
    copied, most = max(copies.items(), key=lambda copy: copy[1], default=("none", 0))
    rows = request.text + request.new_tokens
    tables = sum(min(weight.bytes, LOOK_UP * rows) for _, weight in every if weight.looked_up)
    before = sum(size for role, size in scratch.items() if not decodes(role))
    pieces = (
        Piece(name="runtime", bytes=runtime + ANSWERING, basis="measured"),
        Piece(name="shared libraries", bytes=LIBRARIES, basis="measured", note="mapped"),
        Piece(
            name="weights", bytes=weights, basis="counted", note="the decoder's and codes are private copies"
        ),
        Piece(name="tables", bytes=tables, basis="counted", note="mapped: rows that are looked up"),
        Piece(name="KV cache", bytes=sum(layers), basis="counted"),
        Piece(name="room in the KV cache", bytes=room, basis="counted", note=f"{ROOM} rows of each layer"),
        Piece(
            name="decoder activations",
            bytes=max(0, scratch["decoder"] - (sum(layers) - sum(grown))),
            basis="simulated",
            note="with a second copy of caches that do not grow in place",
        ),
        Piece(name="vision activations", bytes=before, basis="simulated"),
    )
    return Memory(
        pieces=pieces,
        opening=runtime + LIBRARIES + sum(copies.values()) + most,
        taking_turns=None,
        at_once=(Piece(name=f"weight {copied}", bytes=most, basis="counted"),),
    )


def _arena(role: str, subject: Subject, request: Request) -> int:
    """Bytes that a session's arena comes to."""
    arena, graph = Arena(), subject.graphs[role]
    schedule = subject.schedule
    pieces = {row.layer: attention_pieces(schedule, row) for row in schedule.rows if decodes(role)}
    caches = {f"present_{kind}.{layer}" for kind in KINDS for layer in subject.in_place if decodes(role)}
    # A layer that loses weights after the softmax, and a stage that ranks by the layer before it, read copies
    # of what is filled, which a prompt lets go after the layer.
    copied = {(kind, row.layer) for row in schedule.rows if loses_weights(schedule, row) for kind in KINDS}
    for row in schedule.stages:
        if row.select and reads(row.select.by) == "previous":
            kinds = KINDS if isinstance(row.select.by, ValueInfluence) else ("key",)
            copied |= {(kind, row.layer - 1) for kind in kinds}
    copies = caches & {f"present_{kind}.{layer}" for kind, layer in copied}
    outputs, apart = [name for name in graph.outputs if name not in copies], caches - copies

    def run(shapes: dict[str, Shape], cut: Mapping[int | None, int]) -> dict[str, Any]:
        sized, scratch = graph.sized(shapes), partial(live.scores_apart, pieces=cut)
        return live.run(sized, outputs, arena, scratch, outside=apart.__contains__)

    kept = run(subject.first(role, request), {layer: pieces[layer] for layer in subject.in_place & {*pieces}})
    for number in _steps(request.new_tokens) if decodes(role) else ():
        for name in [name for name in kept if not name.startswith("present_")]:
            arena.give(kept.pop(name))
        after = run(subject.step(request, number), {})
        for chunk in kept.values():
            arena.give(chunk)
        kept = after
    return arena.resident


def _steps(new_tokens: int) -> list[int]:
    """Steps that decide: the first ones, in which the arena finds its shape, and some of the others."""
    last = new_tokens - 2  # the first token is the prefill's
    return sorted({number for number in (0, 1, 2, 3, *range(32, last, 32), last) if 0 <= number <= last})
