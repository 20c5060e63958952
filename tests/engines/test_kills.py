"""`kill -9` at random moments, and many processes at once: bundles stay whole.

TRIMVLM_KILLS sets how many exports and builds are killed, together (4 by default);
TRIMVLM_KILLS_LOG names a file that gets a line for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_library import two_profiles
from tiny_models import tiny_llava

from trimvlm.bundle import Bundle

KILLS = int(os.environ.get("TRIMVLM_KILLS", "4"))
TESTS = Path(__file__).parent.parent

# The parent imports everything once; each case is a fork that is killed after a random part of its time.
HARNESS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
kind, root, kills = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
import torch
from fake_library import FakeLibrary, card
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method, Profile
from trimvlm_engines import build as build_module
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
torch.set_num_threads(1)

def exported(name, out):
    layers = (LayerRule(layers=(1,), query="none"),) if name == "late" else ()
    profile = Profile(name=name, method=Method(name=name), model=model_spec(root / "checkpoint"),
                      decisions=Decisions(layers=layers))
    export(root / "checkpoint", profile, out)

def built(name, out):
    build_module.open_library = lambda target: FakeLibrary(target, seconds=0.05)
    build_module.build(out, card(), name)

def forked(work, arguments, kill_after=None):
    child = os.fork()
    if not child:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        end = time.perf_counter() + kill_after
        while time.perf_counter() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status

def state(out):
    "What opens: names of profiles and their engines, after everything was verified; None: it does not."
    try:
        bundle = Bundle(out)
    except UserError as error:
        return str(error)
    bundle.verify()
    for name in bundle.manifest.profiles:
        bundle.profile(name)
    return {name: sorted(entry.engines) for name, entry in bundle.manifest.profiles.items()}

dice, work = random.Random(5), {"export": exported, "build": built}[kind]
base = root / "base"
for name, case in (("first", 0), ("late", 1)) if kind == "export" else (("toy", 0), ("other", 1)):
    whole = root / "whole"
    if case:
        shutil.copytree(base, whole)
    elif kind == "build":
        shutil.copytree(root / "toy", whole)
    before = state(whole) if whole.exists() else "none"
    started = time.perf_counter()
    assert forked(work, (name, whole)) == 0
    seconds, after = time.perf_counter() - started, state(whole)
    for kill in range(kills // 2):
        out = root / f"case-{case}-{kill}"
        if case:
            shutil.copytree(base, out)
        elif kind == "build":
            shutil.copytree(root / "toy", out)
        started = time.perf_counter()
        dead = os.WIFSIGNALED(forked(work, (name, out), dice.uniform(0, seconds)))
        if not dead:  # the machine has become faster
            seconds = min(seconds, time.perf_counter() - started)
        found = state(out) if out.exists() else "none"
        print(json.dumps({"before": before, "after": after, "found": found, "dead": dead}), flush=True)
        if log := os.environ.get("TRIMVLM_KILLS_LOG"):
            with Path(log).open("a") as lines:
                print(kind, case, kill, "killed" if dead else "done", found, file=lines)
        if found != after and kill % 10 == 0:
            assert forked(work, (name, out)) == 0, "the next one mends it"
            assert state(out) == after, state(out)
        shutil.rmtree(out, ignore_errors=True)
    shutil.move(whole, base) if not case else None
"""


def killed(kind: str, root: Path) -> list[dict]:
    """The cases of one kind: what the bundle was before, would be after, and was found to be."""
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, str(TESTS), kind, str(root), str(KILLS // 2)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("kind", ["export", "build"])
def test_a_killed_process_leaves_the_bundle_as_it_was_or_as_it_will_be(kind: str, tmp_path: Path) -> None:
    """Half of the exports make a bundle, half add a profile; half of the builds are a bundle's second."""
    if kind == "export":
        tiny_llava(tmp_path / "checkpoint", layers=2)
    else:
        two_profiles(tmp_path / "toy")
    cases = killed(kind, tmp_path)
    assert len(cases) == KILLS // 4 * 2
    right = [
        case["found"] in (case["before"], case["after"]) or "was interrupted" in case["found"]
        for case in cases
    ]
    assert all(right), cases
    if KILLS > 20:
        assert sum(case["dead"] for case in cases) > len(cases) / 2


BUILD_AND_OPEN = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import pytest
from fake_library import FakeLibrary, card, pretend
from trimvlm import Session
from trimvlm_engines import build as build_module
bundle = Path(sys.argv[2])
build_module.open_library = lambda target: FakeLibrary(target, log=bundle.parent / "log", seconds=0.2)
with pytest.MonkeyPatch.context() as patch:
    pretend(patch)
    patch.setattr("trimvlm.opening.load_backend", lambda *_: None)
    patch.setattr("trimvlm.session.Runner", lambda *_: SimpleNamespace(model=SimpleNamespace(grid=None)))
    for profile in ("toy", "other"):
        Session.open(bundle, profile)
        build_module.build(bundle, card(), profile)
        Session.open(bundle, profile, "rtx-4090")
"""


def test_eight_processes_build_and_open_one_bundle_with_one_build(tmp_path: Path) -> None:
    bundle = two_profiles(tmp_path / "bundle")
    command = [sys.executable, "-c", BUILD_AND_OPEN, str(TESTS), str(bundle)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(8)]
    problems = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, problems
    built = sorted((tmp_path / "log").read_text().split())
    assert built == ["other.decoder.fused.onnx", "toy.decoder.fused.onnx", "vision.onnx"]
    Bundle(bundle).verify()
