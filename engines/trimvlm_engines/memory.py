"""The most private memory that a piece of work takes: what a small board must have free, or swap."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

INTERVAL = 0.01  # seconds between looks; a look takes 30 microseconds
STATUS = Path("/proc/self/status")


def anonymous_bytes(status: Path = STATUS) -> int | None:
    """Private memory of this process, without the files it has mapped; None where Linux does not say."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


class Peak:
    """`with Peak() as peak: ...`, then `peak.bytes`: the most that was seen, or None where nobody could look.

    Of the whole process, whatever it held before included: a fresh `trimvlm build` holds about 0.1 GB.
    """

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bytes is not None:
            self._ended.set()
            self._thread.join()

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes or 0, anonymous_bytes() or 0)
            if self._ended.wait(INTERVAL):
                return
