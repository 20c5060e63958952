"""Memory of a Session, measured from outside in fresh processes, and the time to open it. Linux only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_tools.bench.process_memory import Memory, Watched


class SessionMemory(Value, frozen=True, kw_only=True):
    """Memory of one process per row, all above an empty Python process.

    Attributes:
        weight_bytes: size of the bundle's weight files.
        empty: an empty Python process, for reference (the only row that is not a difference).
        imports: with the runtime and ONNX Runtime imported.
        opened: with a Session open.
        used: after a prefill and some decode steps.
        low_memory: as `used`, of a session opened with `low_memory`.
        several: with Sessions of `together` open at once, in one process; None where it is a single one.
        open_seconds: to open the Session a second time, in a fresh process.
    """

    weight_bytes: int
    empty: Memory
    imports: Memory
    opened: Memory
    used: Memory
    low_memory: Memory
    several: Memory | None = None
    together: tuple[str, ...] = ()
    open_seconds: float

    @property
    def peak_over_weights(self) -> float:
        """Peak of the session that was used, above an empty process, over the weight bytes."""
        return self.used.peak / self.weight_bytes

    @property
    def weights_resident(self) -> float:
        """What open Sessions hold beyond the imports over one copy of the weights, at its worst."""
        held = [each.resident for each in (self.opened, self.several) if each]
        return (max(held) - self.imports.resident) / self.weight_bytes


class Phase(NamedTuple):
    """Memory of a process that waits, and the line that it said before."""

    memory: Memory
    said: str


_EMPTY = "print('ready', flush=True); input()"
_IMPORTS = f"import onnxruntime, trimvlm.session; {_EMPTY}"
_SESSION = """
import sys, time
from contextlib import ExitStack
import numpy as np
from PIL import Image
from trimvlm.session import Session

bundle, prompt, threads, low_memory, *profiles = sys.argv[1:]
pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
with ExitStack() as held:
    start = time.perf_counter()
    for profile in profiles:
        opened = Session.open(bundle, profile, threads=int(threads), low_memory=low_memory == "1")
        session = held.enter_context(opened)
    print(time.perf_counter() - start, flush=True)
    input()
    for _ in session.generate(prompt, [Image.fromarray(pixels)], max_new_tokens=8):
        pass
    print("used", flush=True)
    input()
"""


def session_memory(
    bundle: Path, profiles: Sequence[str], *, prompt: str, weight_bytes: int, threads: int
) -> SessionMemory:
    """Measures the first profile of a bundle, and all given together, each in a fresh process.

    Raises:
        UserError: this system has no /proc, or a process failed; the message ends with its own last line.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from /proc, which this system does not have; leave out --memory")

    def session(names: Sequence[str], *, low_memory: bool = False, count: int = 2) -> list[Phase]:
        options = (prompt, str(threads), str(int(low_memory)))
        return phases(_SESSION, str(bundle), *options, *names, count=count)

    empty = phases(_EMPTY)[0].memory
    imports = phases(_IMPORTS)[0].memory
    opened, used = session(profiles[:1])
    again = session(profiles[:1], count=1)[0]
    low_memory = session(profiles[:1], low_memory=True)[1]
    several = session(profiles, count=1)[0] if len(profiles) > 1 else None
    return SessionMemory(
        weight_bytes=weight_bytes,
        empty=empty,
        imports=imports.minus(empty),
        opened=opened.memory.minus(empty),
        used=used.memory.minus(empty),
        low_memory=low_memory.memory.minus(empty),
        several=several and several.memory.minus(empty),
        together=tuple(profiles) if several else (),
        open_seconds=float(again.said),
    )


def phases(code: str, *arguments: str, count: int = 1) -> list[Phase]:
    """Runs Python code that prints a line and waits for one, and reads its memory `count` times.

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
    measured: list[Phase] = []
    watched = Watched(process.pid)
    with watched.sampled():
        for _ in range(count):
            said, memory = process.stdout.readline(), watched.read()
            if not said or memory is None:
                words = process.stderr.read().strip().splitlines()
                raise UserError(f"measuring memory: {words[-1] if words else 'the process ended early'}")
            measured.append(Phase(memory, said.strip()))
            if len(measured) < count:
                process.stdin.write("\n")
                process.stdin.flush()
    process.kill()  # what may come after the last phase is not wanted
    process.communicate()
    return measured
