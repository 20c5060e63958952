"""How builds write into a Bundle: one at a time per target, files whole, manifest entries never lost.

Two locks, both released by the operating system when a process is killed: a target's lock is held while its
plans are built (they share the vision plan, and on a device the GPU that is being timed), the manifest's lock
(`trimvlm.publishing`) only while plans get their names and the manifest is written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from trimvlm.bundle import Bundle, Engine, Entry, File, Manifest
from trimvlm.errors import UserError
from trimvlm.files import is_whole
from trimvlm.manifest import WEIGHT_KINDS, read_manifest
from trimvlm.publishing import changing, publish

log = logging.getLogger(__name__)


STORES = tuple(f"weights.{kind}." for kind in WEIGHT_KINDS)  # how files begin that `weight_files` makes


class PlanFile:
    """A plan being written: hashed on the way, under a temporary name until `move`.

    A build that fails removes it; what a killed build leaves is never read, and removed by the next build
    for the target (`building` admits one at a time).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.part = path.with_name(f".{path.name}.part")
        self._digest = hashlib.sha256()

    def __enter__(self) -> PlanFile:
        self._file = self.part.open("wb")
        return self

    def write(self, data: bytes | memoryview) -> int:
        """Appends; returns the number of bytes."""
        self._digest.update(data)
        self.bytes += len(data)
        return self._file.write(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is not None:
            self.part.unlink(missing_ok=True)

    def move(self, folder: Path) -> File:
        """Gives the plan its name in a folder that will be published."""
        self.part.replace(folder / self.path.name)
        return self.file

    @property
    def file(self) -> File:
        """Size and hash of what has been written."""
        return File(bytes=self.bytes, sha256=self._digest.hexdigest())

    def discard(self) -> None:
        """Removes what was written and not published."""
        self.part.unlink(missing_ok=True)


@contextmanager
def building(directory: Path, target: str) -> Iterator[None]:
    """Admits one build per target and bundle; a second one waits, then finds the plans up to date."""
    from filelock import FileLock, Timeout

    read_manifest(directory)  # no lock file is left in a directory that is no bundle
    lock = FileLock(directory / f".{target}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("%s: waiting for another build for %s", directory, target)
        lock.acquire()
    try:
        for part in directory.glob(f".*.{target}.*.part"):  # of a killed build
            part.unlink()
        yield
    finally:
        lock.release()


def change_manifest(
    directory: Path, change: Callable[[Manifest], Manifest], plans: Sequence[PlanFile] = ()
) -> None:
    """Publishes plans, and the manifest that names them: `change` of what it is by then."""
    with changing(directory):
        before = read_manifest(directory)
        after = change(before)
        if after == before:
            return
        with tempfile.TemporaryDirectory(
            dir=directory, prefix=".staged.", ignore_cleanup_errors=True
        ) as folder:
            staged = Path(folder)
            for plan in plans:
                plan.move(staged)
            publish(directory, staged, after)


def add_engine(directory: Path, profile: str, engine: Engine, plans: Sequence[PlanFile]) -> None:
    """Publishes plans and records the Engine that uses them."""

    def change(manifest: Manifest) -> Manifest:
        entry = manifest.profiles.get(profile)
        if entry is None:
            raise UserError(f"{directory}: profile {profile} was removed during the build; export it again")
        entry = msgspec.structs.replace(entry, engines={**entry.engines, engine.target: engine})
        return msgspec.structs.replace(
            manifest,
            profiles={**manifest.profiles, profile: entry},
            files={**manifest.files, **{plan.path.name: plan.file for plan in plans}},
        )

    change_manifest(directory, change, plans)


def open_bundle(directory: Path) -> Bundle:
    """Opens a bundle to build in it: an engine whose plan is gone or damaged is forgotten.

    Everything else that is missing stays an error of `Bundle`: only plans can be made here.
    """
    read_manifest(directory)  # no lock file is left in a directory that is no bundle

    def change(manifest: Manifest) -> Manifest:
        plans = {
            file
            for entry in manifest.profiles.values()
            for engine in entry.engines.values()
            for file in engine.made
        }
        # Also of a build that was stopped before its engine was recorded.
        plans |= {name for name in manifest.files if name.startswith(STORES)}
        lost = {name for name in plans if not is_whole(directory / name, manifest.files[name])}
        if not lost:
            return manifest
        log.warning("%s: building again what is missing or damaged: %s", directory, ", ".join(sorted(lost)))
        for name in lost:
            (directory / name).unlink(missing_ok=True)
        return msgspec.structs.replace(
            manifest,
            profiles={name: _without(entry, lost) for name, entry in manifest.profiles.items()},
            files={name: file for name, file in manifest.files.items() if name not in lost},
        )

    change_manifest(directory, change)
    return Bundle(directory)


def _without(entry: Entry, lost: set[str]) -> Entry:
    kept = {target: engine for target, engine in entry.engines.items() if not lost & engine.made}
    return msgspec.structs.replace(entry, engines=kept)
