"""Memory of a process, looked at from outside: private and file-backed apart, now and at most. Linux only."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from trimvlm.value import Value
from trimvlm_tools.bench.machine import kibibytes

_LIBRARY = re.compile(r"\.so(\.|$)")
_SAMPLING = 0.002  # seconds between two looks at a process


class Memory(Value, frozen=True, kw_only=True):
    """Resident memory of a process in bytes.

    Attributes:
        peak: the most that was resident at once so far (VmHWM), private and file-backed together.
        anonymous: private memory now: heaps, arenas, copies of weights.
        file: file-backed now: libraries, mapped weights; the kernel can drop these pages.
        libraries: of `file`, pages of shared libraries. The same process has more of them where the kernel
            keeps their files in larger pieces (measured: 49 MB, and 62 MB just after they were installed).
        weights: of `file`, pages of safetensors files, each once however often this process maps it; less
            where another process maps them as well.
        anonymous_peak, file_peak: the most of either that was seen (sampled).
    """

    peak: int
    anonymous: int
    file: int
    libraries: int
    weights: int = 0
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
            mappings = (self.directory / "smaps").read_text()
        except OSError:
            return None
        private, mapped = rollup["Anonymous"], rollup["Rss"] - rollup["Anonymous"]
        return Memory(
            peak=status["VmHWM"],
            anonymous=private,
            file=mapped,
            libraries=library_pages(mappings),
            weights=weight_pages(mappings),
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


def library_pages(text: str) -> int:
    """Bytes of /proc/PID/smaps that are resident and of shared libraries' files."""
    return sum(
        fields["Rss"] - fields["Anonymous"] for file, fields in _mappings(text) if _LIBRARY.search(file)
    )


def weight_pages(text: str) -> int:
    """Bytes of /proc/PID/smaps that are of safetensors files; a page mapped twice counts half twice."""
    return sum(fields["Pss"] for file, fields in _mappings(text) if file.endswith(".safetensors"))


def _mappings(text: str) -> Iterator[tuple[str, dict[str, int]]]:
    """The last word of each range of addresses, which is its file where it has one, and its fields."""
    lines: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if lines and not line.split()[0].endswith(":"):
            yield lines[0].split()[-1], parse_kernel_fields("\n".join(lines[1:]))
            lines = []
        lines.append(line)


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
