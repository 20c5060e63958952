"""How far the library is with a build, and how Ctrl-C ends one.

The library calls back between the steps of its phases, perhaps from threads of its own. Python runs signal
handlers only in the main thread, which is inside the library all the while; so the callback looks for the
signal's number in the wakeup socket, where the interpreter's C code writes it at once.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """`done` of `total` steps of a phase are done; `depth` 0 is the whole build, 1 a phase of it."""

    phase: str
    done: int
    total: int
    depth: int


Watch = Callable[[Progress], None]


class Share:
    """How much of a build is done, from 0 to 1: each phase counts as one step of the phase around it."""

    def __init__(self) -> None:
        self.value = 0.0
        self._levels: list[tuple[int, int]] = []  # done and total, outermost first

    def __call__(self, progress: Progress) -> float:
        """The share after this report; it never goes back, although phases may overlap."""
        self._levels[progress.depth :] = [(progress.done, max(progress.total, 1))]
        share, step = 0.0, 1.0
        for done, total in self._levels:
            step /= total
            share += min(done, total) * step
        self.value = max(self.value, min(share, 1.0))
        return self.value


class Interrupt:
    """Whether Ctrl-C was pressed; asked from any thread."""

    def __init__(self, wakeup: socket.socket | None = None) -> None:
        self._wakeup = wakeup
        self._pressed = threading.Event()

    def press(self) -> None:
        """As if it had been pressed."""
        self._pressed.set()

    def __bool__(self) -> bool:
        if self._wakeup is not None and not self._pressed.is_set():
            try:
                if signal.SIGINT in self._wakeup.recv(64):
                    self._pressed.set()
            except BlockingIOError:
                pass
        return self._pressed.is_set()


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Holds back the KeyboardInterrupt of Ctrl-C until the library has returned, and raises it then.

    Outside the main thread nothing is caught, as signals do not arrive there; nor where they are ignored.
    """
    handler = signal.getsignal(signal.SIGINT)
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or handler in (None, signal.SIG_IGN):
        yield Interrupt()
        return
    reader, writer = socket.socketpair()
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        interrupt = Interrupt(reader)
        signal.signal(signal.SIGINT, lambda *_: interrupt.press())
        wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        try:
            yield interrupt
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGINT, handler)
            if interrupt:
                raise KeyboardInterrupt from None  # whatever else the library said of it


class Reports:
    """Passes the library's calls on to `watch`; what `watch` raises stops the build and is kept in `failure`:
    an exception must not cross the library's own frames."""

    def __init__(self, watch: Watch, interrupt: Interrupt) -> None:
        self.failure: Exception | None = None
        self._watch = watch
        self._interrupt = interrupt
        self._phases: dict[str, tuple[int, int]] = {}  # name: steps, depth
        self._lock = threading.Lock()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins."""
        with self._lock:
            above = self._phases.get(parent or "")
            depth = above[1] + 1 if above else 0
            self._phases[phase] = (steps, depth)
        self._tell(Progress(phase, 0, steps, depth))

    def step(self, phase: str, number: int) -> bool:
        """Step `number` of a phase is done; False: stop."""
        with self._lock:
            total, depth = self._phases.get(phase, (number + 1, 0))
        self._tell(Progress(phase, number + 1, total, depth))
        return not self._interrupt and self.failure is None

    def finish(self, phase: str) -> None:
        """A phase ends."""
        with self._lock:
            self._phases.pop(phase, None)

    def _tell(self, progress: Progress) -> None:
        try:
            self._watch(progress)
        except Exception as error:  # noqa: BLE001 - raised again when the library has returned
            self.failure = error


def monitor(trt: Any, reports: Reports) -> Any:
    """The library's own kind of progress monitor, over `reports`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            reports.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return reports.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            reports.finish(phase_name)

    return Monitor()
