"""The stand-in for `cuda.bindings.runtime` (cuda-python 12 and 13): the functions that trimvlm calls.

Every function returns a tuple, the error first, as the real ones do (read from cuda-python 12.9 and 13.4).
"""

# ruff: noqa: N801, N802, N815 these are CUDA's names
from __future__ import annotations

from enum import IntEnum
from types import ModuleType
from typing import Any

from tensorrt_standin.device import Device, RefusedError


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaDeviceAttr(IntEnum):
    cudaDevAttrIntegrated = 18


class cudaStream_t:
    """A stream; `int` of it is its handle."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __int__(self) -> int:
        return self._handle


OK = cudaError_t.cudaSuccess
TEXTS = {
    cudaError_t.cudaErrorInsufficientDriver: b"CUDA driver version is insufficient for CUDA runtime version",
    cudaError_t.cudaErrorNoDevice: b"no CUDA-capable device is detected",
    cudaError_t.cudaErrorMemoryAllocation: b"out of memory",
    cudaError_t.cudaErrorIllegalAddress: b"an illegal memory access was encountered",
}


class Runtime(ModuleType):
    """The module.

    Attributes:
        count_error: what the search for GPUs answers.
        driver: CUDA version of the driver, 0 where there is none.
        integrated: the GPU shares the system's memory.
        failing: names of functions that fail from now on.
    """

    cudaError_t, cudaMemcpyKind, cudaDeviceAttr = cudaError_t, cudaMemcpyKind, cudaDeviceAttr
    cudaStream_t = cudaStream_t
    cudaStreamNonBlocking = 1

    def __init__(self, device: Device, name: str) -> None:
        super().__init__(name)
        self.device = device
        self.count_error, self.devices, self.driver = OK, 1, 13000
        self.integrated = 0
        self.failing: set[str] = set()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return (self.count_error, None) if self.count_error else (OK, self.devices)

    def cudaDeviceGetAttribute(self, attribute: cudaDeviceAttr, device: int) -> tuple[Any, ...]:
        if attribute is not cudaDeviceAttr.cudaDevAttrIntegrated or device:
            raise RefusedError(f"{attribute!r} of device {device}")
        return OK, self.integrated

    def cudaRuntimeGetVersion(self) -> tuple[Any, ...]:
        return OK, 13000

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.driver

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[Any, ...]:
        return OK, TEXTS[cudaError_t(error)]

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return OK, self.device.memory - self.device.used, self.device.memory

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return OK, cudaStream_t(self.device.create_stream())

    def cudaStreamDestroy(self, stream: cudaStream_t) -> tuple[Any, ...]:
        self.device.destroy_stream(int(stream))
        return (OK,)

    def cudaStreamSynchronize(self, stream: cudaStream_t) -> tuple[Any, ...]:
        self.device.synchronize(int(stream))
        if "cudaStreamSynchronize" in self.failing:
            return (cudaError_t.cudaErrorIllegalAddress,)
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        address = self.device.allocate(size)
        return (OK, address) if address else (cudaError_t.cudaErrorMemoryAllocation, None)

    def cudaFree(self, address: int) -> tuple[Any, ...]:
        self.device.free(address)
        return (OK,)

    def cudaMallocHost(self, size: int) -> tuple[Any, ...]:
        return OK, self.device.allocate_host(size)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        self.device.free_host(address)
        return (OK,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: cudaMemcpyKind, stream: cudaStream_t
    ) -> tuple[Any, ...]:
        if kind is cudaMemcpyKind.cudaMemcpyHostToDevice:
            self.device.upload(target, source, size, int(stream))
        elif kind is cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.device.download(target, source, size, int(stream))
        else:
            raise RefusedError(f"{kind!r}: the stand-in only copies between host and device")
        return (OK,)
