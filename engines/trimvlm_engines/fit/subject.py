"""One profile of a bundle as a target would run it: its graphs, and what a build knows of them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import onnx

from trimvlm.backends.caches import LAYERS
from trimvlm.bundle import Bundle
from trimvlm.schedule import Schedule
from trimvlm.target import Target
from trimvlm_engines.fit import sizes
from trimvlm_engines.fit.graph import Graph
from trimvlm_engines.fit.outcomes import Shape
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.parts import Part, lowering, parts_of


class Subject(NamedTuple):
    """See the module's text. Graphs and parts are by role, in the order in which they run.

    Attributes:
        in_place: layers whose caches grow where they are (`trimvlm.backends.caches`). The decoder here is the
            one that makes them anew: its sizes follow from shapes alone.
    """

    graphs: dict[str, Graph]
    parts: dict[str, Part]
    schedule: Schedule
    in_place: frozenset[int]

    @classmethod
    def of(cls, bundle: Bundle, name: str, target: Target, float_bytes: int | None = None) -> Subject:
        """The profile `name`.

        Args:
            float_bytes: see `Graph`.

        Raises:
            UserError: no decoder for the target, or a selection that its TopK cannot make.
        """
        entry = bundle.manifest.profiles[name]
        parts = parts_of(bundle, name, entry, target, target.decoder)
        graphs = {
            role: _read(bundle.path(part.graph), part.made, float_bytes) for role, part in parts.items()
        }
        schedule = Schedule.resolve(bundle.profile(name), entry.model)
        grows = lowering(entry, target) == "in_place"
        in_place = _in_place(bundle.path(entry.decoders["in_place"])) if grows else frozenset()
        return cls(graphs, parts, schedule, in_place)

    def first(self, role: str, request: Request) -> dict[str, Shape]:
        """Shapes of a graph's inputs in its first run for a request: of the prompt, or of one image."""
        graph, ranges = self.graphs[role], self.parts[role].ranges
        if "input_ids" in graph.inputs:
            return sizes.prefill(graph, ranges, self.schedule, request)
        return sizes.one(ranges)

    def step(self, request: Request, number: int) -> dict[str, Shape]:
        """Shapes of the decoder's inputs in step `number` of the answer, from 0."""
        return sizes.step(
            self.graphs["decoder"], self.parts["decoder"].ranges, self.schedule, request, number
        )


def _in_place(path: Path) -> frozenset[int]:
    model = onnx.load(str(path), load_external_data=False)
    told = {entry.key: entry.value for entry in model.metadata_props}
    return frozenset(map(int, json.loads(told[LAYERS])["layers"]))


@lru_cache(maxsize=64)
def _read(path: Path, made: bytes | None, float_bytes: int | None) -> Graph:
    return Graph(path, made, float_bytes=float_bytes)
