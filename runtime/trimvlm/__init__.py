"""The runtime of trimvlm: opens a Bundle and answers questions about images on the device.

    from trimvlm import Session

    with Session.open("bundle") as session:
        for piece in session.generate("What is this?", ["photo.jpg"]):
            print(piece, end="", flush=True)

Importing the package loads nothing but itself; each name below brings its module when it is first used. It
turns ONNX Runtime's telemetry off unless the environment says otherwise.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trimvlm.bundle import Bundle, Manifest
    from trimvlm.errors import UserError
    from trimvlm.profile import Profile
    from trimvlm.schedule import Schedule
    from trimvlm.session import Session
    from trimvlm.target import Target
    from trimvlm.text import Prompt, Turn

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Manifest",
    "Profile",
    "Prompt",
    "Schedule",
    "Session",
    "Target",
    "Turn",
    "UserError",
    "__version__",
]

# ONNX Runtime >= 1.29 sends names and hashes of graphs to its maker unless this is set when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "Bundle": "bundle",
    "Manifest": "bundle",
    "Profile": "profile",
    "Prompt": "text",
    "Schedule": "schedule",
    "Session": "session",
    "Target": "target",
    "Turn": "text",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
