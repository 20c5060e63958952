"""Which GPU this machine has, from the CUDA driver alone: no CUDA toolkit, no bindings."""

from __future__ import annotations

import ctypes
import sys

# CUdevice_attribute numbers of cuda.h.
_MAJOR, _MINOR = 75, 76


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
