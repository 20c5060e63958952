"""Build: Bundle + Target -> Engine. `build` shows the whole pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from trimvlm.bundle import Bundle, Engine, Entry, Manifest
from trimvlm.errors import UserError
from trimvlm.profile import Value
from trimvlm.schedule import Schedule
from trimvlm.target import Target
from trimvlm_engines import record, targets
from trimvlm_engines.library import Library, open_library
from trimvlm_engines.shapes import ShapeRange, decoder_ranges, images_range, plain

log = logging.getLogger(__name__)

Role = Literal["vision", "decoder"]
State = Literal["building", "built", "up to date"]
Tell = Callable[[Role, State], None]


class Part(Value, frozen=True, kw_only=True):
    """One graph to build.

    Attributes:
        graph: file of the graph in the bundle.
        plan: file that the plan gets.
        ranges: shape ranges of its inputs.
        sources: what the plan is made of; hashes of everything that goes into it.
    """

    graph: str
    plan: str
    ranges: dict[str, ShapeRange]
    sources: dict[str, Any]


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
        UserError: no such bundle, profile or target; a precision, size or device that does not fit; the
            library is missing or refuses the graph.
    """
    directory, tell = Path(directory), tell or _log
    target = target if isinstance(target, Target) else targets.load(target)
    with record.building(directory, target.name), ExitStack() as plans_left:
        bundle = record.open_bundle(directory)
        name, entry = bundle.entry(profile)
        check(bundle, target)
        library = open_library(target)
        graphs: dict[str, str] = {}
        options: dict[str, Any] = {}
        measured: dict[str, float] = {}
        plans: dict[str, record.PlanFile] = {}
        for role, part in parts(bundle, name, entry, target).items():
            wanted = {**part.sources, **library.options}
            if library.writes_plans:
                wanted["ranges"] = plain(part.ranges)
            known = find(bundle.manifest, target, library, role, wanted)
            if known:
                tell(role, "up to date")
                graphs[role], options[role] = known.graphs[role], known.options[role]
                measured |= {key: value for key, value in known.measured.items() if key.startswith(role)}
                continue
            tell(role, "building")
            started = time.perf_counter()
            if library.writes_plans:
                with record.PlanFile(directory / part.plan) as plan:
                    plans_left.callback(plan.discard)
                    chosen = library.make(bundle.path(part.graph), part.ranges, bundle.manifest.dtype, plan)
                graphs[role], plans[part.plan] = part.plan, plan
                measured[f"{role}_bytes"] = plan.bytes
            else:
                chosen = library.make(bundle.path(part.graph), part.ranges, bundle.manifest.dtype, None)
                graphs[role] = part.graph
            options[role] = {**wanted, **chosen}
            measured[f"{role}_seconds"] = round(time.perf_counter() - started, 3)
            tell(role, "built")
        engine = Engine(
            target=target.name,
            backend=target.backend,
            version=library.version,
            graphs=graphs,
            profile_digest=bundle.profile(name).digest,
            options=options,
            measured=measured,
        )
        record.add_engine(directory, name, engine, plans)
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
            f"{', '.join(target.dtypes)}; export with --dtype {target.dtypes[0]}"
        )
    weights = sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights)
    if target.memory_gb is not None and weights > target.memory_gb * 2**30:
        raise UserError(
            f"{bundle.directory}: {weights / 2**30:.1f} GiB of weights do not fit target {target.name} with "
            f"{target.memory_gb:g} GB; choose a larger target, a smaller model or export in float16"
        )


def parts(bundle: Bundle, name: str, entry: Entry, target: Target) -> dict[Role, Part]:
    """What has to be built for one profile; its vision plan is shared by profiles with the same graph."""
    manifest = bundle.manifest
    profile = bundle.profile(name)
    schedule = Schedule.resolve(profile, manifest.model)
    decoder = entry.decoders.get(target.lowering)
    if decoder is None:
        raise UserError(
            f"{bundle.directory}: profile {name} has no {target.lowering} decoder, which target "
            f"{target.name} takes; export it again"
        )
    weights = {file: manifest.files[file].sha256 for file in manifest.weights}
    height, width = manifest.image_size
    return {
        "vision": Part(
            graph=entry.vision,
            plan=f"{Path(entry.vision).stem}.{target.name}.engine",
            ranges={"pixel_values": images_range(height, width, target.limits)},
            sources={"graph": manifest.files[entry.vision].sha256, "weights": weights},
        ),
        "decoder": Part(
            graph=decoder,
            plan=f"{name}.{target.name}.decoder.engine",
            ranges=decoder_ranges(schedule, target.limits),
            sources={
                "graph": manifest.files[decoder].sha256,
                "weights": weights,
                "profile": profile.digest,
            },
        ),
    }


def find(
    manifest: Manifest, target: Target, library: Library, role: Role, wanted: Mapping[str, Any]
) -> Engine | None:
    """An Engine of this bundle, of any profile, whose part `role` is what a build would make now."""
    for entry in manifest.profiles.values():
        engine = entry.engines.get(target.name)
        if (
            engine
            and (engine.backend, engine.version) == (target.backend, library.version)
            and all(engine.options.get(role, {}).get(key) == value for key, value in wanted.items())
        ):
            return engine
    return None


def _log(role: Role, state: State) -> None:
    log.info("%s: %s", role, state)
