"""Memory of a process, looked at from outside: private and file-backed apart, now and at most. Linux only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from trimvlm.value import Value
from trimvlm_tools.bench.machine import kibibytes

_SAMPLING = 0.002  # seconds between two looks at a process


class Memory(Value, frozen=True, kw_only=True):
    """Resident memory of a process in bytes.

    Attributes:
        peak: the most that was resident at once so far (VmHWM), private and file-backed together.
        anonymous: private memory now: heaps, arenas, copies of weights.
        file: file-backed now: libraries, mapped weights; the kernel can drop these pages.
        anonymous_peak, file_peak: the most of either that was seen (sampled).
    """

    peak: int
    anonymous: int
    file: int
    anonymous_peak: int
    file_peak: int

    @property
    def resident(self) -> int:
        """Private and file-backed now."""
        return self.anonymous + self.file

    def minus(self, other: Memory) -> Memory:
        """Field-wise difference."""
        fields = self.__struct_fields__
        return Memory(**{field: getattr(self, field) - getattr(other, field) for field in fields})


class Watched:
    """A process whose memory is looked at from outside; the peaks of its parts are not kept by the kernel."""

    def __init__(self, pid: int) -> None:
        self.directory = Path("/proc") / str(pid)
        self.highest = {"RssAnon": 0, "RssFile": 0}

    @contextlib.contextmanager
    def sampled(self) -> Iterator[None]:
        """Looks at the process every 2 ms within the block."""
        stop = threading.Event()
        thread = threading.Thread(target=self._sample, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def read(self) -> Memory | None:
        """Its memory at this moment, while it waits; None: it has ended, or the system has no /proc."""
        try:
            status = parse_kernel_fields((self.directory / "status").read_text())
            rollup = parse_kernel_fields((self.directory / "smaps_rollup").read_text())
        except OSError:
            return None
        private, mapped = rollup["Anonymous"], rollup["Rss"] - rollup["Anonymous"]
        return Memory(
            peak=status["VmHWM"],
            anonymous=private,
            file=mapped,
            anonymous_peak=max(self.highest["RssAnon"], private),
            file_peak=max(self.highest["RssFile"], mapped),
        )

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(_SAMPLING):
            try:
                status = parse_kernel_fields((self.directory / "status").read_text())
            except OSError:
                return
            for field in self.highest:
                self.highest[field] = max(self.highest[field], status.get(field, 0))


def parse_kernel_fields(text: str) -> dict[str, int]:
    """Fields in kB of /proc/PID/status or smaps_rollup, in bytes; all other lines are left out."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            size = kibibytes(value)
            assert size is not None
            fields[name] = size
    return fields
