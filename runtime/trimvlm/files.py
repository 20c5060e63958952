"""Files of a bundle: sizes and hashes, and how they are written whole.

Small files are hashed whenever they are wanted. Large ones (weights, plans) are hashed once per machine: a
stamp in the user's cache directory says that a file of this place, size and times had this hash
(docs/decisions/0020-what-opening-checks.md).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

from trimvlm.value import Value

SMALL = 16 << 20  # bytes that are hashed in about the time that Python needs to start
SETTLED = 2.0  # seconds: a file changed later than that could change again within its time stamp's resolution


class File(Value, frozen=True, kw_only=True):
    """A file of the bundle, for verification."""

    bytes: int
    sha256: str


def sha256(path: Path) -> str:
    """SHA-256 of a file, streamed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def record(path: Path) -> File:
    """Size and SHA-256 of a file."""
    return File(bytes=path.stat().st_size, sha256=sha256(path))


def is_whole(path: Path, file: File, *, fresh: bool = False) -> bool:
    """Whether a file has the recorded size and hash; the size is looked at before anything is read.

    Args:
        fresh: hash also a large file that was hashed before, in case the disk has changed it since.
    """
    if not path.is_file() or path.stat().st_size != file.bytes:
        return False
    if file.bytes <= SMALL:
        return sha256(path) == file.sha256
    stamp = _stamp(path, file)
    if not fresh and stamp is not None and stamp.exists():
        return True
    if sha256(path) != file.sha256:
        return False
    if stamp is not None and stamp == _stamp(path, file):  # not changed while it was read
        _leave(stamp, path)
    return True


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all (temporary name, fsync, rename)."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cache_directory() -> Path | None:
    """Where stamps are kept, as the platform has it; None where the user has no home."""
    variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
    try:
        root = Path(os.environ[variable]) if os.environ.get(variable) else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "trimvlm" / "verified"


def _stamp(path: Path, file: File) -> Path | None:
    """The stamp's place: its name is all that was true of the file when it was hashed."""
    root, found = cache_directory(), path.stat()
    known = (path.resolve(), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    name = hashlib.sha256(repr((*map(str, known), file.sha256)).encode()).hexdigest()
    return root / name if root else None


def _leave(stamp: Path, path: Path) -> None:
    found = path.stat()
    if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
        return
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError:  # a read-only home: hashed again next time
        return
