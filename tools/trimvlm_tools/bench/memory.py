"""Memory of a Session, measured from outside in fresh processes: private, file-backed, peak. Linux only."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_tools.bench.machine import kibibytes

_SAMPLING = 0.002  # seconds between two looks at a process


class Memory(Value, frozen=True, kw_only=True):
    """Resident memory of a process in bytes.

    Attributes:
        peak: the most that was resident at once so far (VmHWM), private and file-backed together.
        anonymous: private memory now: heaps, arenas, copies of weights.
        file: file-backed now: libraries, mapped weights; the kernel can drop these pages.
        anonymous_peak: the most private memory seen (sampled).
    """

    peak: int
    anonymous: int
    file: int
    anonymous_peak: int

    def minus(self, other: Memory) -> Memory:
        """Field-wise difference."""
        fields = self.__struct_fields__
        return Memory(**{field: getattr(self, field) - getattr(other, field) for field in fields})


class SessionMemory(Value, frozen=True, kw_only=True):
    """Memory of one process per row, all above an empty Python process.

    Attributes:
        weight_bytes: size of the bundle's weight files.
        empty: an empty Python process, for reference (the only row that is not a difference).
        imports: with the runtime and ONNX Runtime imported.
        opened: with a Session open.
        used: after a prefill and some decode steps.
        low_memory: as `used`, of a session opened with `low_memory`.
    """

    weight_bytes: int
    empty: Memory
    imports: Memory
    opened: Memory
    used: Memory
    low_memory: Memory

    @property
    def peak_over_weights(self) -> float:
        """Peak of the session that was used, above an empty process, over the weight bytes."""
        return self.used.peak / self.weight_bytes


_EMPTY = "print('ready', flush=True); input()"
_IMPORTS = f"import onnxruntime, trimvlm.session; {_EMPTY}"
_SESSION = """
import sys
import numpy as np
from PIL import Image
from trimvlm.session import Session

bundle, profile, prompt, threads, low_memory = sys.argv[1:]
pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
with Session.open(bundle, profile, threads=int(threads), low_memory=low_memory == "1") as session:
    print("opened", flush=True)
    input()
    for _ in session.generate(prompt, [Image.fromarray(pixels)], max_new_tokens=8):
        pass
    print("used", flush=True)
    input()
"""


def session_memory(
    bundle: Path, profile: str, *, prompt: str, weight_bytes: int, threads: int
) -> SessionMemory:
    """Measures a profile of a bundle in five fresh processes.

    Raises:
        UserError: this system has no /proc, or a process failed; the message ends with its own last line.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from /proc, which this system does not have; leave out --memory")

    def session(low_memory: bool) -> list[Memory]:
        return phases(_SESSION, str(bundle), profile, prompt, str(threads), str(int(low_memory)), count=2)

    (empty,) = phases(_EMPTY)
    (imports,) = phases(_IMPORTS)
    opened, used = session(False)
    _, low_memory = session(True)
    return SessionMemory(
        weight_bytes=weight_bytes,
        empty=empty,
        imports=imports.minus(empty),
        opened=opened.minus(empty),
        used=used.minus(empty),
        low_memory=low_memory.minus(empty),
    )


def phases(code: str, *arguments: str, count: int = 1) -> list[Memory]:
    """Runs Python code that prints a line and waits for one, `count` times, and reads its memory each time.

    Raises:
        UserError: the process ended before its last phase.
    """
    process = subprocess.Popen(
        (sys.executable, "-c", code, *arguments),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    measured: list[Memory] = []
    with _Sampler(process.pid) as sampler:
        for _ in range(count):
            if not process.stdout.readline():
                words = process.stderr.read().strip().splitlines()
                raise UserError(f"measuring memory: {words[-1] if words else 'the process ended early'}")
            measured.append(sampler.read())
            process.stdin.write("\n")
            process.stdin.flush()
    process.communicate()
    return measured


class _Sampler:
    """Keeps the highest private memory of a process, which the kernel does not record."""

    def __init__(self, pid: int) -> None:
        self.directory = Path("/proc") / str(pid)
        self.highest = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _Sampler:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.stop.wait(_SAMPLING):
            try:
                status = parse_kernel_fields((self.directory / "status").read_text())
            except OSError:
                return
            self.highest = max(self.highest, status.get("RssAnon", 0))

    def read(self) -> Memory:
        """Memory of the process at this moment; it is waiting."""
        status = parse_kernel_fields((self.directory / "status").read_text())
        rollup = parse_kernel_fields((self.directory / "smaps_rollup").read_text())
        self.highest = max(self.highest, rollup["Anonymous"])
        return Memory(
            peak=status["VmHWM"],
            anonymous=rollup["Anonymous"],
            file=rollup["Rss"] - rollup["Anonymous"],
            anonymous_peak=self.highest,
        )


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
