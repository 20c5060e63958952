"""Build: Bundle + Target -> Engine. `build` shows the whole pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trimvlm import machine
from trimvlm.bundle import Bundle, Engine, Entry, Manifest
from trimvlm.errors import UserError
from trimvlm.images import pixel_shape
from trimvlm.schedule import Schedule
from trimvlm.target import Target
from trimvlm.value import Value
from trimvlm_engines import record, targets
from trimvlm_engines.library import Library, open_library
from trimvlm_engines.shapes import (
    ShapeRange,
    decoder_ranges,
    features_range,
    images_range,
    plain,
    router_ranges,
)

log = logging.getLogger(__name__)

Role = Literal["vision", "projector", "router", "decoder"]
State = Literal["building", "built", "up to date"]
Tell = Callable[[Role, State], None]


class Part(Value, frozen=True, kw_only=True):
    """One graph to build.

    Attributes:
        graph: file of the graph in the bundle.
        plan: file that the plan gets.
        ranges: shape ranges of its inputs.
        sources: hashes of everything that goes into it.
    """

    graph: str
    plan: str
    ranges: dict[str, ShapeRange]
    sources: dict[str, Any]


class Made(NamedTuple):
    """A part that can run: what the Engine says of it, and the plan where one was built just now."""

    graph: str
    options: dict[str, Any]
    measured: dict[str, float]
    plan: record.PlanFile | None = None


def build(
    directory: Path | str,
    target: Target | str = targets.DEFAULT,
    profile: str | None = None,
    *,
    tell: Tell | None = None,
) -> Engine:
    """Makes a bundle's profile runnable on a target and records it in the manifest.

    What is already there and made of the same graph, weights, ranges, options and library version is kept. A
    build that fails or is killed leaves the bundle as it was.

    Args:
        directory: the bundle.
        target: a Target, the name of a shipped one or the path of a YAML file.
        profile: name of the profile; None where the bundle holds a single one.
        tell: called as the work goes on, with the part and its state.

    Raises:
        UserError: no such bundle, profile or target; a damaged file; a precision, size or device that does
            not fit; the library is missing or refuses the graph.
    """
    directory, tell = Path(directory), tell or _log
    target = target if isinstance(target, Target) else targets.load(target)
    with record.building(directory, target.name), ExitStack() as unpublished:
        bundle = record.open_bundle(directory)
        name, entry = bundle.entry(profile)
        check(bundle, target)
        bundle.check(file for file in bundle.manifest.files if file.endswith(".safetensors"))
        library = open_library(target)
        made: dict[Role, Made] = {}
        for role, part in parts(bundle, name, entry, target).items():
            found = find(bundle.manifest, target, library, role, part)
            if found is None:
                tell(role, "building")
                made[role] = make(bundle, library, role, part, unpublished)
            else:
                made[role] = found
            tell(role, "built" if found is None else "up to date")
        engine = Engine(
            target=target.name,
            backend=target.backend,
            version=library.version,
            compute_capability=library.options.get("compute_capability"),
            system=machine.system() if library.writes_plans else None,
            graphs={role: part.graph for role, part in made.items()},
            profile_digest=bundle.profile(name).digest,
            options={role: part.options for role, part in made.items()},
            measured={key: value for part in made.values() for key, value in part.measured.items()},
        )
        record.add_engine(directory, name, engine, [part.plan for part in made.values() if part.plan])
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
    if target.memory_gb is not None and weights > target.memory_gb * 2**30:
        raise UserError(
            f"{bundle.directory}: {weights / 2**30:.1f} GiB of weights do not fit target {target.name} with "
            f"{target.memory_gb:g} GB; choose a larger target, a smaller model or export in float16"
        )


def parts(bundle: Bundle, name: str, entry: Entry, target: Target) -> dict[Role, Part]:
    """What has to be built for one profile. Profiles that share a graph share its plan."""
    manifest = bundle.manifest
    profile = bundle.profile(name)
    schedule = Schedule.resolve(profile, entry.model)
    decoder = entry.decoders.get(target.lowering)
    if decoder is None:
        raise UserError(
            f"{bundle.directory}: profile {name} has no {target.lowering} decoder, which target "
            f"{target.name} takes; export it again"
        )
    weights = {file: manifest.files[file].sha256 for file in manifest.weights}
    pixels = pixel_shape(manifest.image, entry.model.grid)
    found: dict[Role, Part] = {
        "vision": Part(
            graph=entry.vision,
            plan=f"{Path(entry.vision).stem}.{target.name}.engine",
            ranges={"pixel_values": images_range(pixels, target.limits, one=entry.model.grid is not None)},
            sources={"graph": manifest.files[entry.vision].sha256, "weights": weights},
        ),
    }
    if entry.projector:
        rows = entry.tower.views * entry.tower.patches  # not the profile's fewer: the plan is shared
        found["projector"] = Part(
            graph=entry.projector,
            plan=f"{Path(entry.projector).stem}.{target.name}.engine",
            ranges={"features": features_range(rows, entry.tower.width, target.limits)},
            sources={"graph": manifest.files[entry.projector].sha256, "weights": weights},
        )
    if entry.router:
        stored = str(Path(entry.router).with_suffix(".safetensors"))
        found["router"] = Part(
            graph=entry.router,
            plan=f"{Path(entry.router).stem}.{target.name}.engine",
            ranges=router_ranges(entry.model, target.limits),
            sources={
                "graph": manifest.files[entry.router].sha256,
                "weights": {**weights, stored: manifest.files[stored].sha256},
            },
        )
    found["decoder"] = Part(
        graph=decoder,
        plan=f"{name}.{target.name}.decoder.engine",
        ranges=decoder_ranges(schedule, target.limits),
        sources={
            "graph": manifest.files[decoder].sha256,
            "weights": weights,
            "profile": profile.digest,
        },
    )
    return found


def wanted_options(part: Part, library: Library) -> dict[str, Any]:
    """What decides how a part comes out; a plan that was made of anything else is stale."""
    ranges = {"ranges": plain(part.ranges)} if library.writes_plans else {}
    return {**part.sources, **library.options, **ranges}


def find(manifest: Manifest, target: Target, library: Library, role: Role, part: Part) -> Made | None:
    """A part that this bundle already has, of any profile, and that a build would make again."""
    wanted = wanted_options(part, library)
    for entry in manifest.profiles.values():
        engine = entry.engines.get(target.name)
        if engine is None or (engine.backend, engine.version) != (target.backend, library.version):
            continue
        if library.writes_plans and engine.system != machine.system():
            continue
        options = engine.options.get(role, {})
        if "plan" in options and options["plan"] != manifest.files[engine.graphs[role]].sha256:
            continue  # another profile's build has replaced the plan they share
        if all(options.get(key) == value for key, value in wanted.items()):
            measured = {key: value for key, value in engine.measured.items() if key.startswith(role)}
            return Made(engine.graphs[role], options, measured)
    return None


def make(bundle: Bundle, library: Library, role: Role, part: Part, unpublished: ExitStack) -> Made:
    """Builds one part. Its plan is discarded when `unpublished` closes before it was published."""
    started = time.perf_counter()
    graph, dtype = bundle.path(part.graph), bundle.manifest.dtype
    plan = None
    if library.writes_plans:
        with record.PlanFile(bundle.directory / part.plan) as plan:
            unpublished.callback(plan.discard)
            chosen = library.make(graph, part.ranges, dtype, plan)
    else:
        chosen = library.make(graph, part.ranges, dtype, None)
    measured: dict[str, float] = {f"{role}_seconds": round(time.perf_counter() - started, 3)}
    if plan:
        measured[f"{role}_bytes"] = plan.file.bytes
        chosen["plan"] = plan.file.sha256
    file = part.plan if plan else part.graph
    return Made(file, {**wanted_options(part, library), **chosen}, measured, plan)


def _log(role: Role, state: State) -> None:
    log.info("%s: %s", role, state)
