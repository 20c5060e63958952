"""Shapes of a graph's inputs for a request: one prefill, one of the steps after it, one image.

m images, N visual rows of one image, T text rows, P past rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm.target import Limits
from trimvlm.value import Value
from trimvlm_engines.fit.graph import Graph
from trimvlm_engines.fit.outcomes import Shape
from trimvlm_engines.shapes import ShapeRange


class Request(Value, frozen=True, kw_only=True):
    """What is asked of a model.

    Attributes:
        images: in the context.
        text: text rows of the prompt, its template included.
        new_tokens: tokens of the answer.
    """

    images: int = 1
    text: int = 512
    new_tokens: int = 256

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("text", 1), ("new_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: {getattr(self, name)} is too small; give {least} or more")

    def excess(self, limits: Limits) -> dict[str, int]:
        """Fields that ask for more than a plan of these limits takes, with the limit."""
        return {
            name: getattr(limits, name)
            for name in self.__struct_fields__
            if getattr(self, name) > getattr(limits, name)
        }


def largest(ranges: Mapping[str, ShapeRange]) -> dict[str, Shape]:
    """The shapes that a plan sets memory apart for."""
    return {name: shape.max for name, shape in ranges.items()}


def prefill(
    graph: Graph, ranges: Mapping[str, ShapeRange], schedule: Schedule, request: Request
) -> dict[str, Shape]:
    """Shapes of a decoder's or router's inputs in the run over a prompt."""
    sizes = {"text": request.text, "visual": request.images * schedule.visual_tokens}
    return _shapes(graph, ranges, sizes)


def step(
    graph: Graph, ranges: Mapping[str, ShapeRange], schedule: Schedule, request: Request, number: int
) -> dict[str, Shape]:
    """Shapes of a decoder's inputs in step `number` after it, from 0."""
    rows = request.text + number
    pasts = {
        f"past_{group}": request.images * cached + rows for group, cached in enumerate(schedule.kv_groups)
    }
    return _shapes(graph, ranges, {"text": 1, **pasts})


def one(ranges: Mapping[str, ShapeRange]) -> dict[str, Shape]:
    """Shapes of a graph that takes one image at a time; what a plan is tuned for."""
    return {name: shape.opt for name, shape in ranges.items()}


def _shapes(graph: Graph, ranges: Mapping[str, ShapeRange], sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Sizes by their names; one without a name here has no rows, or the fewest that the graph takes."""
    return {
        name: tuple(
            size if isinstance(size, int) else max(sizes.get(size, 0), least)
            for size, least in zip(dims, ranges[name].min, strict=True)
        )
        for name, dims in graph.inputs.items()
    }
