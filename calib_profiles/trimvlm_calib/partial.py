"""Measurements of an unfinished calibration, kept beside its output so that a kill costs one prefill.

    v-skip.yaml.partial      first line: what the run is bound to; then one line per measurement and sample
    v-skip.yaml.partial-1    the same of the second process, where there are several

A line is appended in one piece as soon as its figures are known; one that a kill cut short is dropped. Any
number of processes may go on from the files of any other number.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trimvlm.bundle import write_whole
from trimvlm.errors import UserError

SUFFIX = ".partial"
Figures = tuple[float, ...]


class Partial:
    """What has been measured, by key and sample; kept on disk where there is a place for it.

    Args:
        output: the Profile that the calibration is to write, or None to keep nothing on disk.
        bound: what every measurement depends on; plain data.
        rank: number of this process; each writes a file of its own and reads all.

    Raises:
        UserError: the files there are of a run that is bound to something else; the message names it.
    """

    def __init__(self, output: Path | None = None, bound: Mapping[str, Any] | None = None, rank: int = 0):
        self._known: dict[tuple[str, int], Figures] = {}
        self._file: Path | None = None
        if output is None:
            return
        head = json.dumps(bound or {})
        for path in _files(output):
            self._read(path, json.loads(head))
        self._file = output.with_name(f"{output.name}{SUFFIX}{f'-{rank}' if rank else ''}")
        if self._file.is_file():
            whole, newline, cut = self._file.read_bytes().rpartition(b"\n")
            if cut:
                write_whole(self._file, whole + newline)
        if not self._file.is_file():
            write_whole(self._file, head.encode() + b"\n")

    def get(self, key: str, sample: int) -> Figures | None:
        """The figures, or None where they are still to be measured."""
        return self._known.get((key, sample))

    def put(self, key: str, sample: int, what: str, figures: Sequence[float]) -> None:
        """Keeps figures; `what` is for people who look into the file."""
        self._known[key, sample] = tuple(float(figure) for figure in figures)
        if self._file is not None:
            line = {"key": key, "sample": sample, "what": what, "figures": self._known[key, sample]}
            with self._file.open("ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")

    def _read(self, path: Path, bound: dict[str, Any]) -> None:
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
        if not lines:
            return
        try:
            found = json.loads(lines[0])
            entries = [json.loads(line) for line in lines[1:]]
            known = {(str(e["key"]), int(e["sample"])): tuple(map(float, e["figures"])) for e in entries}
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}: not what trimvlm calibrate keeps of an unfinished run; move it"
            ) from None
        for name, wanted in bound.items():
            was = found.get(name) if isinstance(found, dict) else None
            if was != wanted:
                raise UserError(
                    f"{path}: of an unfinished run with {name} {str(was)[:40]}, but this run has "
                    f"{str(wanted)[:40]}; finish that run, write to another file, or delete this one"
                )
        self._known.update(known)


def discard(output: Path) -> None:
    """Removes what an unfinished calibration of `output` left; for when it is finished."""
    for path in _files(output):
        path.unlink(missing_ok=True)


def key_of(*parts: Any) -> str:
    """Names a measurement by everything that it depends on."""
    return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()[:24]


def _files(output: Path) -> list[Path]:
    pattern = f"{glob.escape(output.name)}{SUFFIX}"
    return sorted([*output.parent.glob(pattern), *output.parent.glob(f"{pattern}-[0-9]*")])
