"""Where export writes, and how that becomes a bundle or part of one.

Everything is written into a hidden folder. A new bundle gets its name when it is whole; a profile is added
to an existing one in a single change (`trimvlm.publishing`). An export that is killed leaves bundles as they
were, and a folder that the next export to the same place removes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trimvlm.bundle import MANIFEST, Bundle, Manifest
from trimvlm.errors import UserError
from trimvlm.manifest import read_manifest
from trimvlm.publishing import STAGED, changing, publish

STARTING = 60.0  # seconds in which an export locks its folder after it has made it


@contextlib.contextmanager
def scratch(out: Path, existing: Bundle | None) -> Iterator[Path]:
    """A folder to export into: beside a new bundle; inside an existing one, with its weights and graphs, so
    that what is there is not made again."""
    from filelock import FileLock

    parent = existing.directory if existing else out.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.export."
    _remove_dead(parent, prefix)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder, FileLock(Path(folder) / "lock"):
        directory = Path(folder) / "bundle"
        directory.mkdir()
        if existing:
            for name in existing.manifest.files:
                if name.endswith((".safetensors", ".onnx")):
                    (directory / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(existing.path(name), directory / name)
        yield directory


def place(directory: Path, out: Path, added: Callable[[Manifest], Manifest]) -> None:
    """Makes what was exported a bundle, or part of the one that is there by now.

    Args:
        directory: the export as a bundle of its own; it is used up.
        added: the manifest of a bundle after this export was added to it.

    Raises:
        UserError: as `added`; or the bundle's weights are damaged.
    """
    if not (out / MANIFEST).exists():
        try:
            if out.exists():
                out.rmdir()  # empty, as export saw when it began
            directory.rename(out)
            return
        except OSError:
            if not (out / MANIFEST).exists():  # else another export was faster
                raise
    with changing(out):
        before = read_manifest(out)
        after = added(before)
        staged = Path(tempfile.mkdtemp(dir=out, prefix=STAGED))
        for name, file in after.files.items():
            if file == before.files.get(name):
                continue
            if (out / name).exists() and (out / name).samefile(directory / name):
                raise UserError(
                    f"{out}: {name} is damaged (SHA-256 differs); copy the bundle again, or export to a new "
                    "directory"
                )
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).replace(staged / name)
        # Its links go before the manifest comes: weights that are older than it need no new hash (`hashes`).
        shutil.rmtree(directory)
        publish(out, staged, after)


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # a file system without hard links
        place.symlink_to(file)


def _remove_dead(parent: Path, prefix: str) -> None:
    """Removes folders of exports that were killed: nobody holds their locks."""
    from filelock import FileLock, Timeout

    for folder in parent.glob(f"{prefix}*"):
        with contextlib.suppress(Timeout, OSError):
            if time.time() - folder.stat().st_mtime > STARTING:
                with FileLock(folder / "lock", timeout=0):
                    shutil.rmtree(folder, ignore_errors=True)
