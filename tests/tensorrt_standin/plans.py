"""Plans of the stand-in: a reference to the ONNX graph, with everything that a real plan is bound to.

`StandInLibrary` takes the place of a library in `trimvlm build`; its plans go the whole way through the
manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx

from trimvlm.target import Target
from trimvlm_engines.library import Work, plan_options

MAGIC = b"stand-in plan\n"
SCRATCH = 10_000  # bytes of activations, whatever the graph


def write_plan(
    graph: Path,
    ranges: list[dict[str, list[list[int]]]],
    *,
    library: str,
    version: str,
    stripped: bool = False,
    version_compatible: bool = False,
) -> bytes:
    """A plan.

    Args:
        ranges: of every set, input to `[min, opt, max]`.
    """
    model = onnx.load(graph, load_external_data=False)
    weights = 0
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        weights += int(external["length"]) if "length" in external else len(tensor.SerializeToString())
    plan = {
        "library": library,
        "version": version,
        "graph": str(_published(graph.resolve())),
        "sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "ranges": ranges,
        "weights": weights + 1,
        "scratch": SCRATCH,
        "stripped": stripped,
        "version_compatible": version_compatible,
    }
    # The weights' bytes, as zeros: a plan is about as large as what it holds.
    return MAGIC + json.dumps(plan).encode() + b"\n" + bytes(0 if stripped else weights)


def _published(graph: Path) -> Path:
    """Where a graph will be: one that the build writes gets its name when the build is done."""
    return graph.with_name(graph.name[1:].removesuffix(".part")) if graph.suffix == ".part" else graph


class StandInLibrary:
    """See `trimvlm_engines.library.Library`."""

    writes_plans = True

    def __init__(self, target: Target, version: str) -> None:
        self.version, self.target = version, target
        self.options = plan_options(target)

    def make(self, work: Work) -> dict[str, Any]:
        assert work.sink is not None
        plain = [{name: each.plain() for name, each in one.items()} for one in work.phases or [work.ranges]]
        plan = write_plan(
            work.graph,
            plain,
            library=self.target.backend,
            version=self.version,
            stripped=self.target.plan.stripped,
            version_compatible=self.target.plan.version_compatible,
        )
        work.sink.write(plan)
        return {"attention": self.target.lowering}
