"""How a bundle changes: one change at a time, seen whole or not at all.

What is new is gathered in a hidden folder inside the bundle, manifest included, and that folder is renamed to
`.pending`: from then on the change holds. Its files are moved to their places, the manifest last. Where a
process is killed on the way, the next change, or `trimvlm verify`, moves the rest.

The lock is the operating system's: it ends with the process that held it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimvlm.bundle import MANIFEST, PENDING, Manifest, write_manifest
from trimvlm.errors import UserError

LOCK = ".manifest.lock"
STAGED = ".staged."  # how names of folders begin that exist only within `changing`


@contextmanager
def changing(directory: Path) -> Iterator[None]:
    """Admits one change at a time; an interrupted one is finished first.

    Raises:
        UserError: filelock is not installed.
    """
    try:
        from filelock import FileLock
    except ModuleNotFoundError:
        raise UserError("filelock is not installed; pip install 'trimvlm[ort]'") from None

    with FileLock(directory / LOCK):
        finish(directory)
        for folder in directory.glob(f"{STAGED}*"):  # of a killed change
            if folder.is_dir():  # else the part of a file of a profile `staged`
                shutil.rmtree(folder)
        yield


def publish(directory: Path, staged: Path, manifest: Manifest) -> None:
    """Puts files in place and makes the manifest the bundle's; within `changing`.

    Args:
        staged: folder inside the bundle that holds the new files under their names in the bundle, and nothing
            else; it is used up.
    """
    write_manifest(staged, manifest)
    staged.rename(directory / PENDING)
    finish(directory)


def finish(directory: Path) -> None:
    """Moves what is pending to its places; nothing is pending after most changes."""
    pending = directory / PENDING
    if not pending.is_dir():
        return
    if (pending / MANIFEST).exists():  # else all was moved, and only the empty folder stayed
        for file in sorted(pending.rglob("*")):
            name = file.relative_to(pending)
            if file.is_file() and name != Path(MANIFEST):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                file.replace(directory / name)
        (pending / MANIFEST).replace(directory / MANIFEST)
    shutil.rmtree(pending)
