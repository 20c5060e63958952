"""What the command line says: reports on stdout, everything else on stderr.

rich draws the progress of long work where stderr is a terminal and rich is installed; otherwise plain lines.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TextIO

INTERVAL = 10.0  # seconds between lines about progress

_report: TextIO | None = None  # stdout while it is reserved for a machine-readable report


def say(line: str) -> None:
    """One line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def reserved_stdout() -> Iterator[None]:
    """Keeps stdout for `emit`: what libraries print meanwhile goes to stderr."""
    global _report  # noqa: PLW0603 - there is one stdout
    _report = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _report = None


def emit(data: Any) -> None:
    """Writes a report as JSON to stdout: plain data, dataclasses or msgspec structs."""
    import msgspec

    stream = _report or sys.stdout
    stream.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")
    stream.flush()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text in aligned columns: numbers to the right, the rest to the left, None as `-`."""
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    right = [
        any(isinstance(row[column], (int, float)) for row in rows)
        and all(row[column] is None or isinstance(row[column], (int, float)) for row in rows)
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Tell(Protocol):
    """`tell(what, done, total)`: so much of this piece of work is done; `note` says what comes."""

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None: ...


@contextlib.contextmanager
def stages() -> Iterator[Tell]:
    """Shows how far long work of several named stages is.

    On a terminal a bar for the stage at work (rich); elsewhere a line every ten seconds, and one at the end
    of a stage that took as long. Both say how much time is left, judged by the pace since the first call.
    """
    bars = _rich_bars() if sys.stderr.isatty() else None
    if bars is None:
        yield _Lines()
        return
    tasks: dict[str, Any] = {}

    def tell(what: str, done: int, total: int | None, note: str = "") -> None:
        if what not in tasks:
            for before in tasks.values():
                bars.update(before, visible=False)
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done, total=total, description=f"{what} {note}".rstrip())

    with bars:
        yield tell


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """The same for work of one stage: call the yielded function with a note after each step."""
    with stages() as tell:
        done = 0

        def step(note: str) -> None:
            nonlocal done
            done += 1
            tell(label, done, total, note)

        tell(label, 0, total)
        yield step
        if total is None:
            tell(label, done, done)


class _Lines:
    """Progress as lines, for logs and for machines without rich."""

    def __init__(self) -> None:
        self.what = ""
        self.started = self.said = time.monotonic()
        self.begun = 0  # what was done when the stage was first heard of

    def __call__(self, what: str, done: int, total: int | None, note: str = "") -> None:
        now = time.monotonic()
        if what != self.what:
            self.what, self.started, self.begun = what, now, done
        if done == total and now - self.started >= INTERVAL:
            self.said = now
            say(f"{what}: done in {now - self.started:.0f} s")
        elif done != total and now - self.said >= INTERVAL:
            self.said = now
            left = ""
            if total and done > self.begun:
                left = f", {_duration((now - self.started) / (done - self.begun) * (total - done))} left"
            say(f"{what}: {done}{f' of {total}' if total else ''}{left} {note}".rstrip())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _rich_bars() -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ModuleNotFoundError:
        return None
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times
    return Progress(*columns, console=Console(stderr=True))
