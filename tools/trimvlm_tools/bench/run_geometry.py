"""`trimvlm bench --geometry`: every figure of one geometry, from a checkpoint of random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from time import perf_counter

from trimvlm.bundle import Bundle
from trimvlm.profile import Profile
from trimvlm_tools import console
from trimvlm_tools.bench.answers import measure_answers
from trimvlm_tools.bench.bars import geometry_bars
from trimvlm_tools.bench.bundles import own_target
from trimvlm_tools.bench.decisions import DENSE
from trimvlm_tools.bench.geometry import AnyGeometry
from trimvlm_tools.bench.machine import Busy, fingerprint
from trimvlm_tools.bench.peers import find_peer
from trimvlm_tools.bench.points import Setting, measure_point
from trimvlm_tools.bench.prepare import Plan, make
from trimvlm_tools.bench.prompt_rows import Point
from trimvlm_tools.bench.report import PeerTerms, Report
from trimvlm_tools.bench.session_memory import session_memory
from trimvlm_tools.bench.size import bundle_size


def bench_geometry(
    geometry: AnyGeometry,
    plan: Plan,
    *,
    text: Sequence[int] = (),
    new_tokens: int,
    threads: int,
    runs: int,
    processes: int,
    operators: Sequence[str] = (),
    sessions: bool = True,
) -> Report:
    """Measures the decoder at every point, answers, memory and size of a geometry.

    Args:
        text: text rows of the points, each with every number of visual rows; empty: as the geometry has them.
        runs: counted rounds of each process.
        processes: of each contender, one after another.
        operators: methods whose decoders are profiled operator by operator after their race.
        sessions: also answers and memory; False: the decoder alone.

    Raises:
        UserError: an unknown method or peer, before anything is made; dense failed.
    """
    machine, made = fingerprint(), make(geometry, plan)
    bundle = Bundle(made.bundle)
    setting = Setting(
        checkpoint=made.checkpoint,
        bundle=made.bundle,
        model=made.model,
        peers=plan.against,
        peers_directory=plan.cache / "peers",
        work=plan.cache / "work" / geometry.name / plan.precision,
        precision=plan.precision,
        threads=threads,
        runs=runs,
        processes=processes,
        seed=geometry.seed,
        operators=tuple(operators),
    )
    texts = text or (geometry.text,)
    busy, started, own = Busy(), perf_counter(), _children_seconds()
    with console.progress("bench") as advance:
        points = tuple(
            measure_point(setting, profiles, Point(visual=rows, text=words, new_tokens=new_tokens), advance)
            for words in texts
            for rows, profiles in made.decoders.items()
        )
        question, answers, memory = geometry.question(texts[0]), None, None
        if sessions:
            answers = measure_answers(
                setting, made.whole, question, geometry.picture, text=texts[0], advance=advance
            )
    others = busy.others(_children_seconds() - own, perf_counter() - started)
    if sessions and plan.precision == "fp32":
        memory = session_memory(
            bundle.directory,
            _members(made.whole),
            target=own_target(plan.precision, made.model),
            prompt=question,
            weight_bytes=sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights),
            threads=threads,
        )
    size = bundle_size(bundle, made.checkpoint)
    return Report(
        machine=machine,
        threads=threads,
        runs=runs,
        processes=processes,
        others_busy=others,
        failed={},
        geometry=geometry.name,
        model=made.model,
        precision=plan.precision,
        peers={name: _terms(name) for name in plan.against},
        points=points,
        answers=answers,
        memory={DENSE: memory} if memory else {},
        size=size,
        bars=geometry_bars(
            geometry.name, plan.precision, points=points, answers=answers, memory=memory, size=size
        ),
    )


def _terms(name: str) -> PeerTerms:
    peer = find_peer(name)
    return PeerTerms(requirements=peer.REQUIREMENTS, settings={k: str(v) for k, v in peer.SETTINGS.items()})


def _members(profiles: Mapping[str, Profile]) -> list[str]:
    """Names in the bundle of dense and of a second profile that can be in one choice with it."""
    stage = profiles[DENSE].decisions.encoder
    return [each.key for each in profiles.values() if each.decisions.encoder == stage][:2]


def _children_seconds() -> float:
    """Processor time of the contenders, which have ended by now, and of this process."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
