"""The decoder graph as a target can take it: vocabulary matrices in pieces, layers in blocks.

Made at build time from the bundle's graph; weights stay where they are. Needs the package onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimvlm.target import Limits
from trimvlm_engines.rewriting import read_graph
from trimvlm_engines.shapes import ShapeRange

if TYPE_CHECKING:
    import onnx

Ranges = Mapping[str, ShapeRange]
Rewrite = Callable[["onnx.ModelProto"], dict[str, Any]]


class Piece(NamedTuple):
    """One graph of a decoder.

    Attributes:
        role: `decoder`, or of blocks `decoder.0`, `decoder.1`, ... in the order in which they run.
        graph: the ONNX file's bytes; None: the bundle's own graph, which needs no change.
        how: what decides it besides the bundle's graph.
        ranges: shape ranges of its inputs.
        phases: the same for prefill and for decode, where they were given.
    """

    role: str
    graph: bytes | None
    how: dict[str, Any]
    ranges: dict[str, ShapeRange]
    phases: tuple[dict[str, ShapeRange], ...]


def pieces(
    graph: Path,
    limits: Limits,
    ranges: Ranges,
    phases: Sequence[Ranges] = (),
    rewrite: Rewrite | None = None,
) -> list[Piece]:
    """The decoder graphs to build for a target with these limits.

    Args:
        graph: the bundle's decoder graph.
        ranges, phases: of its inputs.
        rewrite: what else is done to the graph before it is cut.

    Raises:
        UserError: onnx is not installed, or the graph cannot be cut.
    """
    rows, layers = limits.lm_head_columns, limits.layers_per_engine
    whole = Piece("decoder", None, {}, dict(ranges), tuple(dict(phase) for phase in phases))
    if rows is None and layers is None and rewrite is None:
        return [whole]
    model = read_graph(graph)
    from trimvlm_engines.splitting.vocabulary import split_vocabulary

    how: dict[str, Any] = {}
    if rows is not None and split_vocabulary(model, rows):
        how["lm_head_columns"] = rows
    # Before the rewriting, which may put in operators that ONNX does not know; it changes no size.
    given = [_known(model, each) for each in (ranges, *phases)] if layers is not None else []
    said = rewrite(model) if rewrite else {}
    if layers is None:
        said |= {"split": how} if how else {}
        return [whole._replace(graph=model.SerializeToString(), how=said)] if said else [whole]
    from trimvlm_engines.splitting.blocks import cut

    blocks = cut(model, layers)
    return [
        Piece(
            role=f"decoder.{number}",
            graph=block.SerializeToString(),
            how={**said, "split": {**how, "layers_per_engine": layers, "blocks": len(blocks)}},
            ranges=_of(block, given[0]),
            phases=tuple(_of(block, each) for each in given[1:]),
        )
        for number, block in enumerate(blocks)
    ]


def _known(model: onnx.ModelProto, ranges: Ranges) -> dict[str, ShapeRange]:
    """Shape ranges of every value: its shapes where the inputs are smallest, typical and largest."""
    from trimvlm_engines.splitting.sizes import sizes_at

    low, typical, high = (
        sizes_at(model, {name: getattr(shape, field) for name, shape in ranges.items()})
        for field in ("min", "opt", "max")
    )
    return {
        name: ShapeRange(min=low[name].shape, opt=typical[name].shape, max=kind.shape)
        for name, kind in high.items()
        if name in low and name in typical
    }


def _of(block: onnx.ModelProto, known: Ranges) -> dict[str, ShapeRange]:
    from trimvlm.backends.blocks import CARRIED

    return {value.name: known[value.name.removeprefix(CARRIED)] for value in block.graph.input}
