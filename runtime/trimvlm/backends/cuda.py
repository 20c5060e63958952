"""CUDA through `cuda-python`: memory of the first GPU, page-locked host memory, one stream.

The module is `cuda.bindings.runtime` since cuda-python 12.6, `cuda.cudart` before. Functions of both return a
tuple, the error first.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError

log = logging.getLogger(__name__)

INSTALL = "pip install 'cuda-python==13.*' (12.* where CUDA is 12, as on JetPack 6)"

# cudaError_t of driver_types.h.
_NO_MEMORY, _OLD_DRIVER, _NO_DEVICE = 2, 35, 100
_SYMBOLS_MISSING = (34, 36, 999)  # stub library, call of a newer driver, unknown


class Cuda:
    """The first GPU. Memory and stream belong to whoever asked for them; nothing is held otherwise.

    Raises (on construction):
        UserError: no bindings, no driver, one that is too old, or no GPU.
    """

    def __init__(self) -> None:
        self._runtime = _bindings()
        found = self._runtime.cudaGetDeviceCount()
        if int(found[0]) or not found[1]:
            raise UserError(self._no_device(int(found[0])))
        self._kinds = self._runtime.cudaMemcpyKind

    def create_stream(self) -> Any:
        """A stream that does not wait for the default one; `int` of it is the handle."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def synchronize(self, stream: Any) -> None:
        """Waits until all work on the stream is done.

        Raises:
            UserError: some of it failed.
        """
        self._call("cudaStreamSynchronize", stream)

    def settle(self, stream: Any) -> None:
        """The same after a failure, which is raised already."""
        self._quietly("cudaStreamSynchronize", stream)

    def allocate(self, size: int, what: str) -> int:
        """Address of `size` bytes of device memory, aligned to 256.

        Raises:
            UserError: there are not so many; `what` says what for.
        """
        error, address = self._runtime.cudaMalloc(size)
        if int(error) == _NO_MEMORY:
            free, total = (each >> 20 for each in self._call("cudaMemGetInfo"))
            raise UserError(
                f"the GPU has no room for {what}: {size / 2**20:.1f} MiB are wanted, {free} of {total} MiB "
                "are free; close other programs, let the engines take turns (turns=True), or build for "
                "smaller limits of the target"
            )
        self._check("cudaMalloc", error)
        return int(address)

    def allocate_host(self, size: int) -> int:
        """Address of `size` bytes of page-locked host memory: copies from and to it do not wait."""
        return int(self._call("cudaMallocHost", size))

    def upload(self, device: int, host: int, size: int, stream: Any) -> None:
        """Queues a copy of `size` bytes to the device."""
        self._call("cudaMemcpyAsync", device, host, size, self._kinds.cudaMemcpyHostToDevice, stream)

    def download(self, host: int, device: int, size: int, stream: Any) -> None:
        """Queues a copy of `size` bytes from the device; they are there after `synchronize`."""
        self._call("cudaMemcpyAsync", host, device, size, self._kinds.cudaMemcpyDeviceToHost, stream)

    def free(self, address: int) -> None:
        """Gives device memory back; nothing queued may use it."""
        self._quietly("cudaFree", address)

    def free_host(self, address: int) -> None:
        """Gives page-locked memory back."""
        self._quietly("cudaFreeHost", address)

    def destroy_stream(self, stream: Any) -> None:
        """Gives a stream back."""
        self._quietly("cudaStreamDestroy", stream)

    def available(self, meminfo: Path = Path("/proc/meminfo")) -> int:
        """Bytes that can be allocated. A GPU that shares the system's memory (Jetson) can also have what the
        system only keeps as a file cache, which CUDA does not count as free."""
        free = self._call("cudaMemGetInfo")[0]
        attribute = self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated
        if self._call("cudaDeviceGetAttribute", attribute, 0) and meminfo.is_file():
            for line in meminfo.read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    free = max(free, int(line.split()[1]) * 1024)
        return free

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._runtime, name)(*arguments)
        self._check(name, error)
        return values[0] if len(values) == 1 else values

    def _check(self, name: str, error: Any) -> None:
        if int(error):
            raise UserError(
                f"CUDA: {name}: {self._text(error)} (error {int(error)}); start the program again, and if it "
                "stays, see what trimvlm doctor says"
            )

    def _quietly(self, name: str, argument: Any) -> None:
        """A GPU that failed answers every call with the error that was raised when it did."""
        error, *_ = getattr(self._runtime, name)(argument)
        if int(error):
            log.info("%s: %s", name, self._text(error))

    def _text(self, error: Any) -> str:
        return self._runtime.cudaGetErrorString(error)[1].decode()

    def _no_device(self, error: int) -> str:
        if error in (0, _NO_DEVICE):
            return (
                "CUDA finds no GPU, and plans run only on the one that they were built for; see trimvlm "
                "doctor, or use the target ort-cpu"
            )
        wanted = self._runtime.cudaRuntimeGetVersion()[1]
        driver = self._runtime.cudaDriverGetVersion()[1]
        if not driver or error in _SYMBOLS_MISSING:
            return (
                "no NVIDIA driver answers on this machine; install the driver (on a Jetson: JetPack), see "
                "trimvlm doctor, or use the target ort-cpu"
            )
        if error == _OLD_DRIVER:
            return (
                f"the NVIDIA driver is for CUDA {_said(driver)}, cuda-python for {_said(wanted)}; update the "
                f"driver, or pip install 'cuda-python=={driver // 1000}.*'"
            )
        return f"CUDA does not start: error {error}; see what trimvlm doctor says"


def _bindings() -> Any:
    problem = ""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError) as error:
            problem = f" ({' '.join(str(error).split())})"
    if problem:
        raise UserError(f"cuda-python is installed, but does not load{problem}; {INSTALL}")
    raise UserError(f"the bindings of CUDA are not installed; {INSTALL}")


def _said(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
