"""What `trimvlm bench --geometry` needs before it can race: checkpoint, bundle, and peers' conversions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec, Profile
from trimvlm.value import Value
from trimvlm_tools import console
from trimvlm_tools.bench.bundles import bench_bundle
from trimvlm_tools.bench.decisions import DENSE, METHODS, QUARTER, bench_profiles
from trimvlm_tools.bench.geometry import AnyGeometry, make_checkpoint
from trimvlm_tools.bench.peers import find_peer
from trimvlm_tools.bench.peers.environment import PeerError, prepare_peer


class Plan(Value, frozen=True, kw_only=True):
    """What is asked for: all that decides which bundle and which conversions are needed.

    Attributes:
        against: peers.
        methods: names of `decisions.METHODS`; empty: all. Dense always runs.
        visual: visual rows of the points; empty: as the geometry has them.
        cache: directory for checkpoints, bundles and peers; what is there already is used.
    """

    against: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    visual: tuple[int, ...] = ()
    precision: str = "fp32"
    cache: Path


class Made(Value, frozen=True, kw_only=True):
    """What a plan was made into.

    Attributes:
        decoders: by visual rows the profiles whose decoders run, by method.
        whole: the profiles that answer questions, by method.
    """

    checkpoint: Path
    model: ModelSpec
    bundle: Path
    decoders: dict[int, dict[str, Profile]]
    whole: dict[str, Profile]


def prepare_geometry(geometry: AnyGeometry, plan: Plan) -> dict[str, str | None]:
    """Makes checkpoint, bundle and the peers' conversions, and runs nothing.

    Returns:
        By peer its error, or None where it is ready.

    Raises:
        UserError: an unknown method or peer, before anything is made.
    """
    made = make(geometry, plan)
    found: dict[str, str | None] = dict.fromkeys(plan.against)
    with console.progress("peers", total=len(found)) as advance:
        for name in found:
            try:
                prepare_peer(name, made.checkpoint, plan.cache / "peers", plan.precision)
            except PeerError as error:
                found[name] = str(error)
            advance(name)
    return found


def make(geometry: AnyGeometry, plan: Plan) -> Made:
    """The checkpoint, and one bundle with every profile of the plan.

    Raises:
        UserError: an unknown method or peer, before anything is made.
    """
    for name in plan.against:
        find_peer(name)
    decoded, answered = _wanted(plan.methods)
    checkpoint = make_checkpoint(geometry, plan.cache / "checkpoints" / geometry.name)
    model, tower = geometry.model_spec(), _tower(checkpoint, geometry)
    profiles = {
        rows: _pick(_profiles(model, tower, rows, geometry.text), decoded)
        for rows in plan.visual or [_usual(model)]
    }
    whole = _pick(_profiles(model, tower, model.visual_tokens, geometry.text), answered)
    wanted = [*whole.values(), *(each for found in profiles.values() for each in found.values())]
    bundle = bench_bundle(
        checkpoint,
        {profile.key: profile for profile in wanted},
        plan.cache / "bundles" / geometry.name,
        visual_tokens=model.visual_tokens,
        precision=plan.precision,
    )
    return Made(checkpoint=checkpoint, model=model, bundle=bundle.directory, decoders=profiles, whole=whole)


def _wanted(methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Methods whose decoders run, and those that answer; dense first in both."""
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--profiles: no {name!r} for a geometry; choose from {', '.join(METHODS)}")
    decoded = [name for name in METHODS if name in (methods or set(METHODS) - set(QUARTER))]
    answered = [name for name in QUARTER if not methods or name in methods]
    return list(dict.fromkeys((DENSE, *decoded))), [DENSE, *answered]


def _profiles(model: ModelSpec, tower: Tower, visual: int, text: int) -> dict[str, Profile]:
    """Profiles by method, for so many visual tokens; where the model's images give another number, the names
    tell it."""
    if visual == model.visual_tokens:
        return bench_profiles(model, tower, text)
    other = msgspec.structs.replace(model, visual_tokens=visual, grid=None)
    found = bench_profiles(other, msgspec.structs.replace(tower, views=1), text)
    return {name: msgspec.structs.replace(each, name=f"{name}-{visual}") for name, each in found.items()}


def _pick(profiles: dict[str, Profile], names: Sequence[str]) -> dict[str, Profile]:
    return {name: profiles[name] for name in names}


def _tower(checkpoint: Path, geometry: AnyGeometry) -> Tower:
    from trimvlm_export.checkpoint import tower

    return tower(checkpoint, geometry.model_spec().grid)


def _usual(model: ModelSpec) -> int:
    """Visual rows of the one point where none is asked for: the papers' 576 where grids vary."""
    return 576 if model.grid else model.visual_tokens
