"""What of a run is spent inside the library that executes graphs: everything else is host time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from trimvlm.backends import Backend
from trimvlm.backends.blocks import part_of
from trimvlm_tools.forwarding import Forwarding


class GraphRun(NamedTuple):
    """One execution: the part of the model, and `perf_counter` at its start and end."""

    part: str
    start: float
    end: float


class Clocked(Forwarding):
    """Notes when a backend's graphs run.

    With ONNX Runtime the session itself is clocked, so that all of our own Python counts as host time;
    otherwise the backend's `run`.
    """

    def __init__(self, backend: Backend, runs: list[GraphRun]) -> None:
        super().__init__(backend)
        self.runs = runs
        self.inside = False

    def __enter__(self) -> Clocked:
        super().__enter__()
        sessions = getattr(self.backend, "sessions", None)
        if isinstance(sessions, dict):
            self.inside = True
            sessions.update({role: _Session(held, role, self.runs) for role, held in sessions.items()})
            for role, held in getattr(self.backend, "in_place", {}).items():
                held.session = sessions[role]
        return self

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        start = perf_counter()
        outputs = super().run(role, feeds, fetch, keep)
        if not self.inside:
            self.runs.append(GraphRun(part_of(role), start, perf_counter()))
        return outputs


class _Session:
    """An ONNX Runtime session whose runs are noted; everything else is the session's own."""

    def __init__(self, session: Any, role: str, runs: list[GraphRun]) -> None:
        self.session = session
        self.part = part_of(role)
        self.runs = runs

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.session, name)
        if not name.startswith("run"):
            return found

        def run(*arguments: Any) -> Any:
            start = perf_counter()
            result = found(*arguments)
            self.runs.append(GraphRun(self.part, start, perf_counter()))
            return result

        return run


def split(runs: Sequence[GraphRun], start: float, end: float) -> dict[str, float]:
    """Seconds of one answer between `start` and `end`, from the runs of its graphs.

    Returns:
        `first_graph` (all graphs until the first token), `first_host` (all else until then), and where more
        tokens were decoded `decode_graph` and `decode_host`. The first token is there when the decoder's
        first run ends: choosing it counts as decoding where there is more, else as its own host time.
    """
    decoding = [run for run in runs if run.part == "decoder"]
    later = decoding[1:]
    first = decoding[0].end if later else end
    graph = sum(run.end - run.start for run in runs if run.end <= first)
    found = {"first_graph": graph, "first_host": first - start - graph}
    if later:
        inside = sum(run.end - run.start for run in later)
        found |= {"decode_graph": inside, "decode_host": end - first - inside}
    return found
