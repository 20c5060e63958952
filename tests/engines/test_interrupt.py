"""Progress of a build, and Ctrl-C in the middle of one: it stops, and the bundle is as it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_library import card, two_profiles
from fake_trt import STEPS, fake_tensorrt

from trimvlm import machine
from trimvlm.bundle import Bundle
from trimvlm_engines.build import build
from trimvlm_engines.progress import Interrupt, Progress, Share, interruptible
from trimvlm_tools import console
from trimvlm_tools.cli import main

TESTS = Path(__file__).parent.parent


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return two_profiles(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """Ctrl-C is: where the tests run in the background a shell has it ignored, and children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def contents(bundle: Path) -> dict[str, bytes]:
    """What is in it, but for locks."""
    files = (path for path in bundle.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(bundle).as_posix(): path.read_bytes() for path in files}


# The command line, with every report slowed down so that the signal finds the build at work.
SLOWED = """
import contextlib, sys, time
from trimvlm_tools import cli, console

@contextlib.contextmanager
def stages():
    def show(what, done, total, note=""):
        if done > int(sys.argv[2]) and "decoder" in what:
            print(note, flush=True)
            time.sleep(0.05)
    yield show

console.stages = stages
sys.exit(cli.main(["build", sys.argv[1], "--target", "rtx-4090", "--profile", "toy"]))
"""


@pytest.mark.parametrize("percent", [0, 20])
def test_ctrl_c_stops_tensorrt_rtx(bundle: Path, percent: int) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = contents(bundle)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, str(bundle), str(percent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline()  # the decoder is at work; the vision plan is there and not published
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "trimvlm build: interrupted\n"
    assert rest.count("\n") < 20  # an undisturbed build prints fifty lines and more from here
    assert contents(bundle) == before
    Bundle(bundle).verify()
    build(bundle, card(), "toy")  # no lock was left behind


def pressed() -> None:
    """Ctrl-C, as the terminal sends it."""
    os.kill(os.getpid(), signal.SIGINT)


def pressed_while_another_thread_runs() -> None:
    """The library may call back from a thread of its own, while the main one waits inside it."""
    thread = threading.Thread(target=pressed)
    thread.start()
    thread.join()


@pytest.mark.parametrize("press", [pressed, pressed_while_another_thread_runs])
@pytest.mark.parametrize("version", ["10.16.1.11", "11.4.0.106"])
def test_ctrl_c_stops_any_version(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, version: str, press: Any
) -> None:
    told: list[Progress] = []
    fake = fake_tensorrt(version, at_step=lambda step: press() if step == 10 else None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(machine, "compute_capability", lambda: "8.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
    before, handler = contents(bundle), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, "rtx-4090-tensorrt", "toy", watch=lambda role, progress: told.append(progress))
    assert told[-1] == Progress(
        "Timing tactics", 11, STEPS, 1
    )  # the step at which it was pressed, and no more
    assert contents(bundle) == before
    assert not (bundle.parent / "cache").exists()  # times of half a build are not kept
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_is_seen_while_the_main_thread_is_inside_a_library() -> None:
    """No Python runs there then, so no handler does: the wakeup socket tells."""
    inside, seen = threading.Event(), threading.Event()

    def ask(interrupt: Interrupt) -> None:
        pressed()
        while inside.is_set() and not seen.is_set():
            if interrupt and inside.is_set():
                seen.set()

    with pytest.raises(KeyboardInterrupt), interruptible() as interrupt:
        thread = threading.Thread(target=ask, args=[interrupt])
        inside.set()
        thread.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # a second of C
        inside.clear()
        thread.join()
    assert seen.is_set()


def test_outside_the_main_thread_a_build_runs_all_the_same(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    thread = threading.Thread(target=build, args=(bundle, card(), "toy"))
    thread.start()
    thread.join()
    assert "rtx-4090" in Bundle(bundle).manifest.profiles["toy"].engines


def test_where_ctrl_c_is_ignored_it_stays_ignored() -> None:
    """As in a job that a script started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as interrupt:
            pressed()
            assert not interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def test_tensorrt_rtx_tells_how_far_it_is(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    told: dict[str, list[Progress]] = {}
    build(bundle, card(), "toy", watch=lambda role, progress: told.setdefault(role, []).append(progress))
    assert list(told) == ["vision", "decoder"]
    for reports in told.values():
        share, values = Share(), []
        values = [share(each) for each in reports]
        assert values == sorted(values) and values[0] == 0.0 and 0.8 < values[-1] <= 1.0
        assert len(set(values)) > 10
        assert reports[0].depth == 0 and {each.depth for each in reports} > {0, 1}
        assert all(0 <= each.done <= each.total for each in reports)


def test_what_a_watcher_raises_ends_the_build_and_is_raised(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = contents(bundle)

    def watch(role: str, progress: Progress) -> None:
        raise RuntimeError("the terminal is gone")

    with pytest.raises(RuntimeError, match="the terminal is gone"):
        build(bundle, card(), "toy", watch=watch)
    assert contents(bundle) == before


def test_share_of_nested_phases() -> None:
    share = Share()
    reports = [
        ("all", 0, 4, 0),
        ("one", 0, 2, 1),
        ("one", 1, 2, 1),
        ("all", 1, 4, 0),
        ("two", 0, 5, 1),
        ("all", 4, 4, 0),
    ]
    assert [share(Progress(*each)) for each in reports] == [0.0, 0.0, 0.125, 0.25, 0.25, 1.0]


def test_the_verb_shows_phases_and_percent(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    shown: list[tuple[str, int, int | None, str]] = []

    @contextlib.contextmanager
    def stages() -> Iterator[Any]:
        yield lambda what, done, total, note="": shown.append((what, done, total, note))

    monkeypatch.setattr(console, "stages", stages)
    assert main(["build", str(bundle), "--target", "rtx-4090", "--profile", "toy"]) == 0
    for role in ("vision", "decoder"):
        percents = [done for what, done, _, _ in shown if what == f"toy (1 of 1) {role}"]
        assert percents == sorted(percents) and percents[0] == 0 and percents[-1] == 100
        assert len(set(percents)) > 10
    notes = [note for _, _, total, note in shown if total == 100]
    assert notes[0] == "building" and notes[-1] == "built"
    assert any(re.fullmatch(r"Timing .* \d+/\d+", note) for note in notes)
    shown.clear()
    assert main(["build", str(bundle), "--target", "rtx-4090", "--profile", "toy"]) == 0
    assert [(done, note) for _, done, _, note in shown] == [(100, "up to date")] * 2
    assert "up to date" in capsys.readouterr().out
