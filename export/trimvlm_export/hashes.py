"""SHA-256 of weight files, each computed once: gigabytes take longer to hash than to export.

A file is known by where it lies on the disk, its size and its time of modification, so that a checkpoint's
file and its hard link in a bundle are one.
"""

from __future__ import annotations

from pathlib import Path

from trimvlm.bundle import MANIFEST, Bundle, sha256

_known: dict[tuple[int, ...], str] = {}


def weight_hash(file: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    key = _identity(file)
    if key not in _known:
        _known[key] = sha256(file)
    return _known[key]


def remember(bundle: Bundle) -> None:
    """Takes over the hashes of a bundle's weight files that nothing touched since its manifest was made."""
    written = (bundle.directory / MANIFEST).stat().st_mtime_ns
    for name in bundle.manifest.weights:
        file = bundle.path(name)
        if file.stat().st_mtime_ns < written and file.stat().st_ctime_ns < written:
            _known[_identity(file)] = bundle.manifest.files[name].sha256


def _identity(file: Path) -> tuple[int, ...]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
