"""`trimvlm bench --geometry`: every figure of one geometry, from a checkpoint of random weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from time import perf_counter

from trimvlm.bundle import MANIFEST, Bundle
from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm_tools import console
from trimvlm_tools.bench.decisions import bench_profiles
from trimvlm_tools.bench.geometry import GEOMETRY_FILE, Geometry, make_checkpoint
from trimvlm_tools.bench.machine import Busy, fingerprint
from trimvlm_tools.bench.memory import session_memory
from trimvlm_tools.bench.peer import check_peer
from trimvlm_tools.bench.prefill import (
    DENSE,
    PEER,
    against_peer,
    contests,
    peer_contender,
    prefill_contenders,
    run_contest,
)
from trimvlm_tools.bench.report import Report, geometry_bars
from trimvlm_tools.bench.size import bundle_size


def bench_geometry(
    geometry: Geometry, *, against: str | None, methods: list[str], threads: int, runs: int, cache: Path
) -> Report:
    """Measures prefill, memory and size of a geometry.

    Args:
        against: `transformers`, or None for no peer.
        methods: names of `bench_profiles`; empty: all. Dense always runs.
        cache: directory for checkpoints, bundles and the peer's graph; what is there already is used.

    Raises:
        UserError: an unknown method, or a peer that cannot be exported here; before anything is made.
    """
    if against == PEER:
        check_peer()
    machine = fingerprint()
    profiles = _wanted(bench_profiles(geometry.model_spec()), methods)
    checkpoint = make_checkpoint(geometry, cache / "checkpoints" / geometry.name)
    bundle = export_bundle(checkpoint, profiles, cache / "bundles" / geometry.name)
    work = (cache / "work" / geometry.name).absolute()
    contenders = prefill_contenders(bundle, profiles, geometry, work, threads=threads)
    if against == PEER:
        contenders.append(
            peer_contender(checkpoint, geometry, cache / "peer" / geometry.name, work, threads=threads)
        )
    busy, started = Busy(), perf_counter()
    own = _children_seconds()
    with console.progress("prefill", total=len(contenders) + runs + 2) as advance:
        result = run_contest(contenders, work, runs=runs, advance=advance)
    others = busy.others(_children_seconds() - own, perf_counter() - started)
    memory = session_memory(
        bundle.directory,
        DENSE,
        prompt=geometry.question(geometry.text),
        weight_bytes=sum(bundle.manifest.files[name].bytes for name in bundle.manifest.weights),
        threads=threads,
    )
    prefill = tuple(contests(result, profiles, geometry.text))
    peer = against_peer(result, checkpoint, work) if against == PEER and PEER not in result.failed else None
    size = bundle_size(bundle, checkpoint)
    return Report(
        machine=machine,
        threads=threads,
        runs=runs,
        others_busy=others,
        failed=result.failed,
        geometry=geometry,
        prefill=prefill,
        against=peer,
        memory={DENSE: memory},
        size=size,
        bars=geometry_bars(prefill, peer, memory, size),
    )


def export_bundle(checkpoint: Path, profiles: dict[str, Profile], directory: Path) -> Bundle:
    """The bundle of a checkpoint with these profiles; what it holds already is not exported again.

    A bundle that another exporter or checkpoint made is made anew.
    """
    from trimvlm_export.export import export

    stamp = directory.with_suffix(".made")
    made = f"{_exporter_digest()}\n{(checkpoint / GEOMETRY_FILE).read_text()}"
    if not (stamp.is_file() and stamp.read_text() == made):
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(made)
    held = set(Bundle(directory).manifest.profiles) if (directory / MANIFEST).is_file() else set()
    missing = {
        name: profile
        for name, profile in profiles.items()
        if name not in held or Bundle(directory).profile(name).digest != profile.digest
    }
    with console.progress("export", total=len(missing)) as advance:
        for name, profile in missing.items():
            export(checkpoint, profile, directory)
            advance(name)
    return Bundle(directory)


def _exporter_digest() -> str:
    """SHA-256 over the exporter's sources: its graphs are cached between runs."""
    import trimvlm_export

    digest = hashlib.sha256()
    for root in trimvlm_export.__path__:
        for path in sorted(Path(root).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _wanted(profiles: dict[str, Profile], methods: list[str]) -> dict[str, Profile]:
    for name in methods:
        if name not in profiles:
            raise UserError(f"--profiles: no {name!r} for a geometry; choose from {', '.join(profiles)}")
    return {name: p for name, p in profiles.items() if not methods or name in methods or name == DENSE}


def _children_seconds() -> float:
    """Processor time of the contenders, which have ended by now, and of this process."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
