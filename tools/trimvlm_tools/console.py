"""What the command line says: reports on stdout, everything else on stderr.

rich draws the progress of long work where stderr is a terminal and rich is installed; otherwise plain lines.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

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


@contextlib.contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """Shows that long work goes on; call the yielded function after each step with what was done.

    On a terminal a bar (rich); elsewhere a line at most every ten seconds and one at the end.
    """
    bar = _rich_bar() if sys.stderr.isatty() else None
    if bar is not None:
        with bar:
            task = bar.add_task(label, total=total)
            yield lambda step: bar.update(task, advance=1, description=f"{label}: {step}" if step else label)
            bar.update(task, description=label)
        return
    started = said = time.monotonic()
    done = 0

    def advance(step: str) -> None:
        nonlocal done, said
        done += 1
        if time.monotonic() - said >= 10:
            said = time.monotonic()
            say(f"{label}: {done}{f'/{total}' if total else ''} {step}".rstrip())

    yield advance
    say(f"{label}: done in {time.monotonic() - started:.1f} s")


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
