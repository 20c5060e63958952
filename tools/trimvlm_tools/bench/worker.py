"""The protocol of a contender's process.

One JSON object per line. On stdout: `{"ready": ...}` once its model is open, with `open_seconds` and, where
it knows, `imports` (bytes resident before); then one reply per command. On stdin: `run` (reply: `seconds`,
`cpu_seconds` and figures of its own), `save FILE` (what the last run gave, as .npz), end of file to leave.
Whatever else the process prints goes to stderr.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


def say(replies: Any, message: dict[str, Any]) -> None:
    """One reply."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def own_stdout() -> TextIO:
    """The protocol's stdout; whatever else is printed goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def resident() -> int | None:
    """Bytes of memory that this process holds now; None where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
