"""Kernel times of earlier builds by classic TensorRT, kept for the next build on this machine.

One file per TensorRT version and SM in the user's cache directory. Builds that run at the same time lose
nothing: under a lock each adds its own times to those that are there by then. The file begins with its
SHA-256, so a damaged one is known before TensorRT reads it; it is replaced.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from trimvlm.files import cache_directory, write_whole

log = logging.getLogger(__name__)

_DIGEST = 32


def cache_path(version: str, compute_capability: str) -> Path | None:
    """Where the times of a version and SM are kept; None where the user has no home."""
    directory = cache_directory()
    return directory and directory.with_name("timing") / f"tensorrt-{version}-sm{compute_capability}.cache"


class TimingCache:
    """The times of one IBuilderConfig: `load` before a build, `save` after a successful one."""

    def __init__(self, config: Any, path: Path | None) -> None:
        self._config = config
        self._path = path

    def load(self) -> None:
        """Gives TensorRT the times of earlier builds; without any, or refused, it begins with none."""
        stored = self._stored()
        if stored is not None and self._config.set_timing_cache(stored, ignore_mismatch=False):
            return
        if stored is not None:
            log.warning("%s: kernel times of another GPU; they are measured again", self._path)
        self._config.set_timing_cache(self._config.create_timing_cache(b""), ignore_mismatch=False)

    def save(self) -> None:
        """Adds this build's times to what is on disk by now; a disk that is full costs the times only."""
        from filelock import FileLock

        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                times, stored = self._config.get_timing_cache(), self._stored()
                if stored is not None:
                    times.combine(stored, ignore_mismatch=False)
                data = bytes(times.serialize())
                write_whole(self._path, hashlib.sha256(data).digest() + data)
        except OSError as error:
            log.warning("%s: kernel times are not kept: %s", self._path, error)

    def _stored(self) -> Any | None:
        """The times on disk as TensorRT holds them; None: there are none, or they are damaged."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            content = self._path.read_bytes()
        except OSError:
            content = b""
        digest, data = content[:_DIGEST], content[_DIGEST:]
        found = None
        if hashlib.sha256(data).digest() == digest:
            found = self._config.create_timing_cache(data)
        if found is None:
            log.warning("%s: damaged; kernels are timed again", self._path)
        return found
