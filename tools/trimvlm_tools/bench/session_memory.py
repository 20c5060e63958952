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
        choice_opened: with `together` held as the members of a choice; None where it is a single one.
        choice: the same after an answer of each.
        open_seconds: to open the Session a second time, in a fresh process.
    """

    weight_bytes: int
    empty: Memory
    imports: Memory
    opened: Memory
    used: Memory
    low_memory: Memory
    choice_opened: Memory | None = None
    choice: Memory | None = None
    together: tuple[str, ...] = ()
    open_seconds: float

    @property
    def peak_over_weights(self) -> float:
        """Peak of the session that was used, above an empty process, over the weight bytes."""
        return self.used.peak / self.weight_bytes

    @property
    def weights_resident(self) -> float:
        """What a Session holds of weights after an answer over one copy of them, see `_weights`."""
        return self._weights(self.opened, self.used)

    @property
    def choice_weights_resident(self) -> float | None:
        """The same of the choice."""
        if self.choice_opened is None or self.choice is None:
            return None
        return self._weights(self.choice_opened, self.choice)

    def _weights(self, opened: Memory, used: Memory) -> float:
        """All private memory that opening took, copies of weights among it, and the mapped weights that were
        read by the end; the caches and activations of the answer are not weights."""
        return (opened.anonymous - self.imports.anonymous + used.weights) / self.weight_bytes


class Phase(NamedTuple):
    """Memory of a process that waits, and the line that it said before."""

    memory: Memory
    said: str


_EMPTY = "print('ready', flush=True); input()"
_IMPORTS = f"import onnxruntime, trimvlm.session; {_EMPTY}"
_CHOICE = "from trimvlm_tools.bench.choice import main; main()"
_SESSION = """
import sys, time
import numpy as np
from PIL import Image
from trimvlm.session import Session

bundle, target, prompt, threads, low_memory, profile = sys.argv[1:]
pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
start = time.perf_counter()
with Session.open(bundle, profile, target, threads=int(threads), low_memory=low_memory == "1") as session:
    print(time.perf_counter() - start, flush=True)
    input()
    for _ in session.generate(prompt, [Image.fromarray(pixels)], max_new_tokens=8):
        pass
    print("used", flush=True)
    input()
"""


def session_memory(
    bundle: Path, profiles: Sequence[str], *, target: str, prompt: str, weight_bytes: int, threads: int
) -> SessionMemory:
    """Measures the first profile of a bundle, and all given as members of a choice, each in a fresh process.

    Raises:
        UserError: this system has no /proc, or a process failed; the message ends with its own last line.
    """
    if not Path("/proc/self/smaps_rollup").is_file():
        raise UserError("memory is read from /proc, which this system does not have; leave out --memory")

    def session(*, low_memory: bool = False, count: int = 2) -> list[Phase]:
        options = (target, prompt, str(threads), str(int(low_memory)))
        return phases(_SESSION, str(bundle), *options, profiles[0], count=count)

    empty = phases(_EMPTY)[0].memory
    imports = phases(_IMPORTS)[0].memory
    opened, used = session()
    again = session(count=1)[0]
    low_memory = session(low_memory=True)[1]
    choice_opened = choice = None
    if len(profiles) > 1:
        choice_opened, choice = phases(_CHOICE, str(bundle), target, prompt, str(threads), *profiles, count=2)
    return SessionMemory(
        weight_bytes=weight_bytes,
        empty=empty,
        imports=imports.minus(empty),
        opened=opened.memory.minus(empty),
        used=used.memory.minus(empty),
        low_memory=low_memory.memory.minus(empty),
        choice_opened=choice_opened and choice_opened.memory.minus(empty),
        choice=choice and choice.memory.minus(empty),
        together=tuple(profiles) if choice else (),
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
