"""What an Engine is bound to, compared with the bundle and the machine before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trimvlm import machine
from trimvlm.backends.blocks import block_roles, part_of
from trimvlm.bundle import Bundle, Engine, Entry, rebuild
from trimvlm.errors import UserError
from trimvlm.filling import is_filled
from trimvlm.schedule import Schedule
from trimvlm.target import numbers

_SM = "the GPU's SM"


class Mismatch(NamedTuple):
    """A field of which the engine was built with one value, and another was found."""

    field: str
    built: Any
    found: Any


def check_engine(bundle: Bundle, profile: str, engine: Engine) -> None:
    """Refuses an engine that is not of this bundle, profile, library version, GPU and system.

    Raises:
        UserError: naming the field, both values and the command that builds it anew.
    """
    for field, built, found in _mismatches(bundle, profile, engine):
        remedy = rebuild(bundle.directory, engine, profile)
        if field == _SM and found is None:
            remedy = f"no GPU answers here: see trimvlm doctor; on a machine with another one {remedy}"
        raise UserError(
            f"{bundle.directory}: the engine of profile {profile} for {engine.target} does not fit: {field} "
            f"is {_said(found)}, but it was built for {_said(built)}; {remedy}"
        )


def runs_on_version(backend: str, built: str, found: str, options: Mapping[str, Any]) -> bool:
    """Whether a part that one version built runs on another.

    Only on the very same, but for version-compatible plans of classic TensorRT: those run on what is newer
    within the same major (https://docs.nvidia.com/deeplearning/tensorrt, Engine Compatibility; that page has
    11 run those of 10 as well, which nobody here has seen).

    Args:
        options: of the part, from the Engine.
    """
    if built == found:
        return True
    old, new = numbers(built), numbers(found)
    return (
        backend == "tensorrt"
        and options.get("version_compatible") is True
        and old[:1] == new[:1]
        and old <= new
    )


def _mismatches(bundle: Bundle, profile: str, engine: Engine) -> Iterator[Mismatch]:
    entry = bundle.manifest.profiles[profile]
    digest = bundle.profile(profile).digest
    if engine.profile_digest != digest:
        yield Mismatch("the profile's digest", engine.profile_digest, digest)
    plans = engine.backend in machine.PLAN_LIBRARIES
    if plans:
        yield from _of_machine(engine)
    graphs = _graphs(entry)
    blocks = block_roles(engine.graphs)
    wanted = [role for role in graphs if role != "decoder" or not blocks] + _all_blocks(engine, blocks)
    if set(engine.graphs) != set(wanted):
        yield Mismatch("the list of its parts", ", ".join(engine.graphs), ", ".join(wanted))
        return
    for role, file in engine.graphs.items():
        if plans or file not in graphs[part_of(role)]:
            yield from _of_plan(bundle, graphs[part_of(role)], engine, role)
    if plans:
        yield from _of_ranges(Schedule.resolve(bundle.profile(profile), entry.model), engine)


def _all_blocks(engine: Engine, found: list[str]) -> list[str]:
    """Roles of all blocks that a decoder was cut into, of which these were found."""
    counts = {engine.options.get(role, {}).get("split", {}).get("blocks", 0) for role in found}
    return [f"decoder.{number}" for number in range(max(counts, default=0))]


def _of_machine(engine: Engine) -> Iterator[Mismatch]:
    """Version, GPU and system; a library that is not installed is its backend's error."""
    version = machine.library_version(engine.backend)
    if version is None:
        return
    parts = engine.options.values() or [{}]
    if not all(runs_on_version(engine.backend, engine.version, version, part) for part in parts):
        yield Mismatch(f"the version of {engine.backend}", engine.version, version)
    if (system := machine.system()) != engine.system:
        yield Mismatch("the operating system", engine.system, system)
    if (capability := machine.compute_capability()) != engine.compute_capability:
        yield Mismatch(_SM, engine.compute_capability, capability)


def _of_plan(bundle: Bundle, graphs: list[str], engine: Engine, role: str) -> Iterator[Mismatch]:
    """Hashes of the plan, and of the graph and weights that it was made from."""
    manifest, options = bundle.manifest, engine.options.get(role, {})
    plan = manifest.files[engine.graphs[role]].sha256
    if options.get("plan") != plan:
        yield Mismatch(f"the hash of {engine.graphs[role]}", options.get("plan"), plan)
    now = {name: manifest.files[name].sha256 for name in graphs}
    if options.get("graph") not in now.values():
        yield Mismatch(f"the hash of {', '.join(now)}", options.get("graph"), " or ".join(now.values()))
    for name, built in {**dict.fromkeys(manifest.weights), **options.get("weights", {})}.items():
        found = manifest.files[name].sha256 if name in manifest.files else None
        if built != found:
            yield Mismatch(f"the hash of {name}", built, found)


def _of_ranges(schedule: Schedule, engine: Engine) -> Iterator[Mismatch]:
    """Inputs of the decoder, and that every layer has room for as much text after its visual rows."""
    ranges: dict[str, Any] = {}
    for role, options in engine.options.items():
        if part_of(role) == "decoder":
            ranges |= options.get("ranges", {})
    pasts = {
        f"past_{half}.{row.layer}": row for half in ("key", "value") for row in schedule.rows if row.attends
    }
    if built := {name for name in ranges if name.startswith(("past_key", "past_value"))} ^ set(pasts):
        yield Mismatch("ranges", sorted(name for name in built if name in ranges), sorted(built & set(pasts)))
        return
    visual = ranges.get("visual", [[0], [0], [0]])[2][0] - is_filled(ranges)
    images = visual // schedule.visual_tokens
    rooms = {name: ranges[name][2][2] - images * row.cached for name, row in pasts.items()}
    for name, room in rooms.items():
        wanted = next(iter(rooms.values()))
        if room != wanted:
            row = pasts[name]
            yield Mismatch(f"ranges.{name}", ranges[name][2][2], wanted + images * row.cached)


def _graphs(entry: Entry) -> dict[str, list[str]]:
    """Role to the graphs that may play it."""
    some = {"projector": entry.projector, "router": entry.router}
    return {
        "vision": [entry.vision],
        **{role: [file] for role, file in some.items() if file},
        "decoder": list(entry.decoders.values()),
    }


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
