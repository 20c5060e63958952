"""`trimvlm bench --geometry`: every figure of one geometry, from a checkpoint of random weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import msgspec

from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec, Profile
from trimvlm_tools import console
from trimvlm_tools.bench.answers import measure_answers
from trimvlm_tools.bench.bars import geometry_bars
from trimvlm_tools.bench.bundles import bench_bundle
from trimvlm_tools.bench.decisions import DENSE, METHODS, QUARTER, bench_profiles
from trimvlm_tools.bench.geometry import AnyGeometry, make_checkpoint
from trimvlm_tools.bench.machine import Busy, fingerprint
from trimvlm_tools.bench.peers import find_peer
from trimvlm_tools.bench.points import Setting, measure_point
from trimvlm_tools.bench.prompt_rows import Point
from trimvlm_tools.bench.report import PeerTerms, Report
from trimvlm_tools.bench.session_memory import session_memory
from trimvlm_tools.bench.size import bundle_size


def bench_geometry(
    geometry: AnyGeometry,
    *,
    against: Sequence[str],
    methods: Sequence[str],
    visual: Sequence[int],
    text: Sequence[int],
    new_tokens: int,
    precision: str,
    threads: int,
    runs: int,
    cache: Path,
) -> Report:
    """Measures the decoder at every point, answers, memory and size of a geometry.

    Args:
        against: peers.
        methods: names of `decisions.METHODS`; empty: all. Dense always runs.
        visual, text: visual and text rows of the points, every pair of them; empty: as the geometry has them.
        cache: directory for checkpoints, bundles and peers; what is there already is used.

    Raises:
        UserError: an unknown method or peer, before anything is made; dense failed.
    """
    terms = {name: _terms(name) for name in against}
    decoded, answered = _wanted(methods)
    machine = fingerprint()
    checkpoint = make_checkpoint(geometry, cache / "checkpoints" / geometry.name)
    model, tower = geometry.model_spec(), _tower(checkpoint, geometry)
    sweep = [
        Point(visual=rows, text=words, new_tokens=new_tokens)
        for words in text or [geometry.text]
        for rows in visual or [_usual(model)]
    ]
    profiles = {
        rows: _profiles(model, tower, rows, geometry.text) for rows in {point.visual for point in sweep}
    }
    whole = _pick(_profiles(model, tower, model.visual_tokens, geometry.text), answered)
    wanted = [
        *whole.values(),
        *(each for found in profiles.values() for each in _pick(found, decoded).values()),
    ]
    bundle = bench_bundle(
        checkpoint,
        {profile.key: profile for profile in wanted},
        cache / "bundles" / geometry.name,
        visual_tokens=model.visual_tokens,
        precision=precision,
    )
    setting = Setting(
        checkpoint=checkpoint,
        bundle=bundle.directory,
        model=model,
        peers=tuple(against),
        peers_directory=cache / "peers",
        work=cache / "work" / geometry.name / precision,
        precision=precision,
        threads=threads,
        runs=runs,
        seed=geometry.seed,
    )
    busy, started, own = Busy(), perf_counter(), _children_seconds()
    with console.progress("bench") as advance:
        points = tuple(
            measure_point(setting, _pick(profiles[point.visual], decoded), point, advance) for point in sweep
        )
        question = geometry.question(sweep[0].text)
        answers = measure_answers(
            setting, whole, question, geometry.picture, text=sweep[0].text, advance=advance
        )
    others = busy.others(_children_seconds() - own, perf_counter() - started)
    memory = None
    if precision == "fp32":
        memory = session_memory(
            bundle.directory,
            [profile.key for profile in whole.values()][:2],
            prompt=question,
            weight_bytes=sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights),
            threads=threads,
        )
    size = bundle_size(bundle, checkpoint)
    return Report(
        machine=machine,
        threads=threads,
        runs=runs,
        others_busy=others,
        failed={},
        geometry=geometry.name,
        model=model,
        precision=precision,
        peers=terms,
        points=points,
        answers=answers,
        memory={DENSE: memory} if memory else {},
        size=size,
        bars=geometry_bars(
            geometry.name, precision, points=points, answers=answers, memory=memory, size=size
        ),
    )


def _terms(name: str) -> PeerTerms:
    peer = find_peer(name)
    return PeerTerms(requirements=peer.REQUIREMENTS, settings={k: str(v) for k, v in peer.SETTINGS.items()})


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


def _children_seconds() -> float:
    """Processor time of the contenders, which have ended by now, and of this process."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
