"""`trimvlm bench BUNDLE`: the steps of an answer and the memory of a bundle's profiles."""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import perf_counter

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm_tools import console
from trimvlm_tools.bench.machine import Busy, fingerprint
from trimvlm_tools.bench.report import Report
from trimvlm_tools.bench.session_memory import SessionMemory, session_memory
from trimvlm_tools.bench.stages import time_steps


def bench_bundle(
    directory: Path,
    *,
    profiles: list[str],
    target: str,
    image: Path | None,
    prompt: str,
    tokens: int,
    memory: bool,
    threads: int,
    runs: int,
    processes: int,
) -> Report:
    """Measures a bundle.

    Args:
        profiles: names; empty: all that the bundle holds.
        image: the picture that is asked about; None: noise.
        memory: also measure the memory of each profile's session (ONNX Runtime only).

    Raises:
        UserError: no such profile or picture, or memory of a target that keeps it elsewhere.
    """
    machine = fingerprint()
    bundle = Bundle(directory.absolute())
    names = [bundle.entry(name)[0] for name in profiles] or sorted(bundle.manifest.profiles)
    if image is not None and not image.is_file():
        raise UserError(f"--image: {image} is no file")
    if memory and target != "ort-cpu":
        raise UserError(f"--memory: measured for ort-cpu only, not for {target}")
    busy, started = Busy(), perf_counter()
    with (
        tempfile.TemporaryDirectory() as work,
        console.progress("bench", total=processes * (len(names) + runs + 2)) as advance,
    ):
        steps, result = time_steps(
            bundle,
            names,
            target,
            Path(work),
            image=image and image.absolute(),
            prompt=prompt,
            tokens=tokens,
            threads=threads,
            runs=runs,
            processes=processes,
            advance=advance,
        )
    others = busy.others(result.cpu_seconds, perf_counter() - started)
    measured: dict[str, SessionMemory] = {}
    for name in names if memory else ():
        weights = sum(bundle.manifest.files[file].bytes for file in bundle.manifest.weights)
        measured[name] = session_memory(
            bundle.directory, [name], target=target, prompt=prompt, weight_bytes=weights, threads=threads
        )
    return Report(
        machine=machine,
        threads=threads,
        runs=runs,
        processes=processes,
        samples={step.profile: result.samples(step.profile) for step in steps},
        others_busy=others,
        failed=result.failed,
        bundle=str(directory),
        target=target,
        steps=tuple(steps),
        memory=measured,
    )
