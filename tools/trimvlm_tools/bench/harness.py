"""Runs contenders turn by turn, each in a process of its own, and keeps what every run took.

One process each, because ONNX Runtime sessions that share a process disturb each other; turn by turn (A B C,
B C A, ...), because the speed of a machine drifts: ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

from trimvlm.value import Value
from trimvlm_tools.bench.process_memory import Memory, Watched

# ONNX Runtime and what is built on it report home otherwise: nobody here does, ours or a peer.
SILENT = {"ORT_DISABLE_TELEMETRY": "1"}
_TRACEBACK = "Traceback (most recent call last):"
_WORDS = 300  # characters of an error's message
_SETTLING = 0.05  # seconds: threads of the contender before may still wait busily


class Contender(Value, frozen=True, kw_only=True):
    """Something to time: a command that speaks the protocol of `worker.py`."""

    name: str
    command: tuple[str, ...]


class Resident(Value, frozen=True, kw_only=True):
    """Memory of a contender's process.

    Attributes:
        imports: bytes resident before it loaded its model, of those that say so.
        opened: with the model loaded.
        used: after its last run; the peaks are those of loading and of the warm-up.
    """

    imports: int | None
    opened: Memory
    used: Memory


class Spread(Value, frozen=True, kw_only=True):
    """Median and range of one quantity over the counted rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(median=median(values), min=min(values), max=max(values))


class Race(Value, frozen=True, kw_only=True):
    """What was measured.

    Attributes:
        figures: per contender and figure (`seconds` wall-clock time, `cpu_seconds` of all threads, whatever
            else it replies) one value per counted round, in the order of the rounds.
        open_seconds: time to open the session.
        failed: contenders that failed, with their error; they have no figures.
        memory: of each process; empty where the system has no /proc.
    """

    figures: dict[str, dict[str, tuple[float, ...]]]
    open_seconds: dict[str, float]
    failed: dict[str, str]
    memory: dict[str, Resident] = {}

    def spread(self, name: str, figure: str = "seconds") -> Spread:
        """Of one figure of one contender."""
        return Spread.of(self.figures[name][figure])

    def ratio(self, name: str, to: str, figure: str = "seconds") -> Spread:
        """A figure of `name` over that of `to`, round by round."""
        return Spread.of(self.ratios(name, to, figure))

    def ratios(self, name: str, to: str, figure: str = "seconds") -> list[float]:
        """What `ratio` is the spread of."""
        pairs = zip(self.figures[name][figure], self.figures[to][figure], strict=True)
        return [mine / other for mine, other in pairs]

    def cores(self, name: str) -> float:
        """Processors that a contender kept busy while it ran, median over its rounds."""
        figures = self.figures[name]
        return median(c / w for c, w in zip(figures["cpu_seconds"], figures["seconds"], strict=True))

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all counted runs together."""
        return sum(sum(figures.get("cpu_seconds", ())) for figures in self.figures.values())


class ContenderError(RuntimeError):
    """A contender's process ended or answered nonsense; the message is its own last words."""


class _Process:
    """A running contender."""

    def __init__(self, contender: Contender) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            contender.command,
            env={**os.environ, **SILENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.watched = Watched(self.process.pid)

    def ask(self, command: str) -> dict[str, Any]:
        """Sends a command and returns the reply."""
        assert self.process.stdin
        # A contender that has died is reported by `read`, with its own last words.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(command + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next reply.

        Raises:
            ContenderError: there is none.
        """
        assert self.process.stdout
        line = self.process.stdout.readline()
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            raise ContenderError(self._last_words(line))
        return cast("dict[str, Any]", reply)

    def close(self) -> None:
        """Ends the process; one that does not leave when its commands end is killed."""
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self.errors.close()

    def kill(self) -> None:
        """Ends a process that is in the way."""
        self.process.kill()
        self.process.wait()

    def _last_words(self, line: str) -> str:
        if line:
            return f"not a reply: {line.strip()[:200]!r}"
        code = self.process.wait()
        self.errors.seek(0)
        return last_words(self.errors.read().decode(errors="replace"), code)


def last_words(errors: str, code: int) -> str:
    """Why a process ended, from what it printed to stderr: all lines of the last exception's message and what
    follows, or the last line."""
    lines = errors.strip().splitlines() or ["no message"]
    words = lines[-1:]
    if _TRACEBACK in lines:
        start = len(lines) - lines[::-1].index(_TRACEBACK)
        words = [*itertools.dropwhile(lambda line: line.startswith("  "), lines[start:])] or words
    said = " ".join(" ".join(words).split())
    if len(said) > _WORDS:  # the last traceback may have been handled: what came after it counts, too
        said = f"{said[: _WORDS // 2]} ... {said[-_WORDS // 2 :]}"
    return f"exit code {code}: {said}"


def race(
    contenders: Sequence[Contender],
    *,
    runs: int,
    warmup: int = 2,
    save: dict[str, Path] | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Race:
    """Times the contenders, `warmup` uncounted rounds and `runs` counted ones.

    Args:
        contenders: at least one, names distinct.
        runs: counted rounds, at least 1.
        warmup: rounds before, not counted.
        save: contender to file: where its outputs of the last round are written.
        advance: called after each contender's start and after each round.
    """
    assert runs > 0 and len({c.name for c in contenders}) == len(contenders)
    alive: dict[str, _Process] = {}
    opened: dict[str, float] = {}
    failed: dict[str, str] = {}
    times: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    imports: dict[str, int | None] = {}
    at_open: dict[str, Memory] = {}
    memory: dict[str, Resident] = {}

    def attempt(name: str, action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        try:
            return action()
        except ContenderError as error:
            failed[name] = str(error)
            process = alive.pop(name)
            process.kill()
            process.close()
            return None

    try:
        for contender in contenders:  # one after the other: they would slow each other's start
            process = alive[contender.name] = _Process(contender)
            with process.watched.sampled():
                reply = attempt(contender.name, process.read)
            if reply:
                opened[contender.name] = float(reply.get("open_seconds", 0.0))
                imports[contender.name] = reply.get("imports")
                if now := process.watched.read():
                    at_open[contender.name] = now
            advance(f"{contender.name} open")
        for round_ in range(warmup + runs):
            names = list(alive)
            first = round_ % len(names) if names else 0
            for name in names[first:] + names[:first]:
                time.sleep(_SETTLING)
                # Looking at a process costs it time, so only what is not counted is looked at.
                with alive[name].watched.sampled() if round_ < warmup else contextlib.nullcontext():
                    reply = attempt(name, lambda name=name: alive[name].ask("run"))
                if reply and round_ >= warmup:
                    times[name].append({figure: float(value) for figure, value in reply.items()})
            advance(f"round {round_ + 1}")
        for name, process in alive.items():
            if (now := process.watched.read()) and name in at_open:
                memory[name] = Resident(imports=imports[name], opened=at_open[name], used=now)
        for name, path in (save or {}).items():
            if name in alive:
                attempt(name, lambda name=name, path=path: alive[name].ask(f"save {path}"))
    finally:
        for process in alive.values():
            process.close()
    return Race(
        figures={
            name: {figure: tuple(reply[figure] for reply in replies) for figure in replies[0]}
            for name, replies in times.items()
            if name not in failed
        },
        open_seconds={name: seconds for name, seconds in opened.items() if name not in failed},
        failed=failed,
        memory={name: held for name, held in memory.items() if name not in failed},
    )


def own_contender(name: str, module: str, spec: dict[str, Any], path: Path) -> Contender:
    """A contender of ours: `trimvlm_tools.bench.MODULE` with a specification, which is written to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(spec))
    command = (sys.executable, "-m", f"trimvlm_tools.bench.{module}", str(path.absolute()))
    return Contender(name=name, command=command)
