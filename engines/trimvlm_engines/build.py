"""Build: Bundle + Target -> Engine. `build` shows the whole pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimvlm import machine
from trimvlm.binding import runs_on_version
from trimvlm.bundle import Bundle, Engine, Manifest
from trimvlm.errors import UserError
from trimvlm.target import Target, numbers
from trimvlm_engines import record, targets
from trimvlm_engines.library import Library, Work, open_library
from trimvlm_engines.memory import Peak
from trimvlm_engines.parts import Part, Role, parts
from trimvlm_engines.progress import Progress
from trimvlm_engines.shapes import plain
from trimvlm_engines.weight_files import ensure

__all__ = ["Made", "Part", "Role", "build", "check", "find", "make", "parts", "wanted_options"]

log = logging.getLogger(__name__)

State = Literal["building", "built", "up to date"]
Tell = Callable[[Role, State], None]
Watch = Callable[[Role, Progress], None]


class Made(NamedTuple):
    """A part that can run: what the Engine says of it, and the files that were made just now."""

    graph: str
    version: str
    options: dict[str, Any]
    measured: dict[str, float]
    files: tuple[record.PlanFile, ...] = ()


def build(
    directory: Path | str,
    target: Target | str = targets.DEFAULT,
    profile: str | None = None,
    *,
    asked: str = "",
    tell: Tell | None = None,
    watch: Watch | None = None,
) -> Engine:
    """Makes a bundle's profile runnable on a target and records it in the manifest.

    What is already there and made of the same graph, weights, ranges, options and library version is kept. A
    build that fails or is killed leaves the bundle as it was.

    Args:
        directory: the bundle.
        target: a Target, the name of a shipped one or the path of a YAML file.
        profile: name of the profile; None where the bundle holds a single one.
        asked: what asks `trimvlm build` for this target, where that is not its name alone.
        tell: called as the work goes on, with the part and its state.
        watch: called with the part and how far the library is with its plan, many times a second.

    Raises:
        UserError: no such bundle, profile or target; a damaged file; a precision, size or device that does
            not fit; the library is missing or refuses the graph.
        KeyboardInterrupt: Ctrl-C; the bundle is as it was.
    """
    directory, tell, watch = Path(directory), tell or _log, watch or _ignore
    target = target if isinstance(target, Target) else targets.load(target)
    with record.building(directory, target.name), ExitStack() as unpublished:
        bundle = record.open_bundle(directory)
        name, entry = bundle.entry(profile)
        check(bundle, target)
        bundle.check(file for file in bundle.manifest.files if file.endswith(".safetensors"))
        library = open_library(target)
        made: dict[Role, Made] = {}
        todo = parts(bundle, name, entry, target)
        if stores := {part.store.name: part.store for part in todo.values() if part.store}:
            for store in stores.values():
                bundle = ensure(bundle, store)
            todo = parts(bundle, name, entry, target)
        for role, part in todo.items():
            found = find(bundle.manifest, target, library, role, part)
            if found is None:
                tell(role, "building")
                made[role] = make(bundle, library, role, part, unpublished, watch=watch)
            else:
                made[role] = found
            tell(role, "built" if found is None else "up to date")
        engine = Engine(
            target=target.name,
            asked=asked,
            backend=target.backend,
            version=max((part.version for part in made.values()), key=numbers),
            compute_capability=library.options.get("compute_capability"),
            system=machine.system() if library.writes_plans else None,
            graphs={role: part.graph for role, part in made.items()},
            profile_digest=bundle.profile(name).digest,
            options={role: part.options for role, part in made.items()},
            measured=_measured(bundle, made),
        )
        record.add_engine(directory, name, engine, [file for part in made.values() for file in part.files])
    return engine


def check(bundle: Bundle, target: Target) -> None:
    """Refuses what cannot run, before anything is built.

    Raises:
        UserError: the target does not run the bundle's precision, or its memory does not hold the weights.
    """
    dtype = bundle.manifest.dtype
    if dtype not in target.dtypes:
        raise UserError(
            f"{bundle.directory}: the weights are {dtype}, but target {target.name} runs "
            f"{', '.join(target.dtypes)}; export with --dtype {target.dtypes[0]}, or build for a target that "
            f"runs {dtype} (trimvlm targets)"
        )
    weights = sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights)
    if target.weights:  # at least; embeddings stay as they are, and mostly vision
        weights = weights * target.weights.bits // (32 if dtype == "float32" else 16)
    if target.memory_gb is not None and weights > target.memory_gb * 2**30:
        raise UserError(
            f"{bundle.directory}: {weights / 2**30:.1f} GiB of weights do not fit target {target.name} with "
            f"{target.memory_gb:g} GB; choose a larger target, a smaller model or export in float16"
        )


def wanted_options(part: Part, library: Library) -> dict[str, Any]:
    """What decides how a part comes out; a plan that was made of anything else is stale."""
    ranges: dict[str, Any] = {}
    if library.writes_plans:
        ranges = {"ranges": plain(part.ranges), "phases": [plain(phase) for phase in part.phases]}
    return {**part.sources, **library.options, **ranges}


def find(manifest: Manifest, target: Target, library: Library, role: Role, part: Part) -> Made | None:
    """A part that this bundle already has, of any profile, and that a build would make again."""
    wanted = wanted_options(part, library)
    for entry in manifest.profiles.values():
        engine = entry.engines.get(target.name)
        if engine is None or engine.backend != target.backend:
            continue
        if library.writes_plans and engine.system != machine.system():
            continue
        options = engine.options.get(role, {})
        if not runs_on_version(target.backend, engine.version, library.version, options):
            continue
        if "plan" in options and options["plan"] != manifest.files[engine.graphs[role]].sha256:
            continue  # another profile's build has replaced the plan they share
        if all(options.get(key) == value for key, value in wanted.items()):
            measured = {key: value for key, value in engine.measured.items() if key.startswith(f"{role}_")}
            return Made(engine.graphs[role], engine.version, options, measured)
    return None


def make(
    bundle: Bundle, library: Library, role: Role, part: Part, unpublished: ExitStack, *, watch: Watch
) -> Made:
    """Builds one part. Its files are discarded when `unpublished` closes before they were published."""
    graph = None if part.made is None else _write(bundle.directory / part.graph, part.made, unpublished)
    work = Work(
        graph=graph.part if graph else bundle.path(part.graph),
        ranges=part.ranges,
        dtype=bundle.manifest.dtype,
        phases=part.phases,
        watch=lambda progress: watch(role, progress),
    )
    started, plan = time.perf_counter(), None
    with Peak() as peak:
        if library.writes_plans:
            with record.PlanFile(bundle.directory / part.plan) as plan:
                unpublished.callback(plan.discard)
                chosen = library.make(work._replace(sink=plan))
        else:
            chosen = library.make(work)
    measured: dict[str, float] = {f"{role}_seconds": round(time.perf_counter() - started, 3)}
    if peak.bytes is not None:
        measured[f"{role}_peak_bytes"] = peak.bytes
    if plan:
        measured[f"{role}_bytes"] = plan.file.bytes
        chosen["plan"] = plan.file.sha256
    if graph:
        chosen = {"plan": graph.file.sha256, **chosen, "piece": part.graph}
    options = {**wanted_options(part, library), **chosen}
    files = tuple(file for file in (graph, plan) if file)
    return Made(part.plan if plan else part.graph, library.version, options, measured, files)


def _write(path: Path, data: bytes, unpublished: ExitStack) -> record.PlanFile:
    with record.PlanFile(path) as file:
        unpublished.callback(file.discard)
        file.write(data)
    return file


def _measured(bundle: Bundle, made: dict[Role, Made]) -> dict[str, float]:
    """What was measured of each part, and the bytes of all plans over those of the weights."""
    found = {key: value for part in made.values() for key, value in part.measured.items()}
    plans = [found[f"{role}_bytes"] for role in made if f"{role}_bytes" in found]
    weights = sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights)
    if plans and weights:
        found["weights_ratio"] = round(sum(plans) / weights, 4)
    return found


def _ignore(role: Role, progress: Progress) -> None:
    pass


def _log(role: Role, state: State) -> None:
    log.info("%s: %s", role, state)
