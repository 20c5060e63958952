"""This machine, as an engine is bound to it: library version, GPU and operating system."""

from __future__ import annotations

import ctypes
import importlib
import platform
import re
import sys
from pathlib import Path

# Libraries that run plans; names in a manifest are not imported blindly.
PLAN_LIBRARIES = ("tensorrt", "tensorrt_rtx")

_TEGRA = Path("/etc/nv_tegra_release")
# CUdevice_attribute numbers of cuda.h.
_MAJOR, _MINOR = 75, 76


def library_version(backend: str) -> str | None:
    """Exact version of an installed library of `PLAN_LIBRARIES`; None where it is not installed, or does not
    load: its backend says why."""
    assert backend in PLAN_LIBRARIES, backend
    try:
        return importlib.import_module(backend).__version__
    except (ImportError, OSError):
        return None


def system(tegra: Path = _TEGRA) -> str:
    """Operating system and processor, e.g. `linux-x86_64`; on a Jetson with its L4T release, which names the
    JetPack: `linux-aarch64-l4t36.4.3`."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine().lower()
    )
    found = None
    if tegra.is_file():
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", tegra.read_text(errors="replace"))
    return f"{sys.platform}-{machine}" + (f"-l4t{found[1]}.{found[2]}" if found else "")


def compute_capability() -> str | None:
    """SM of the first GPU, e.g. `8.7`; None where there is no driver or no GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        numbers.append(str(value.value))
    return ".".join(numbers)
