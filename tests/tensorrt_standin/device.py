"""The stand-in's GPU: memory with addresses of its own, streams that do nothing until somebody waits.

Device memory cannot be reached through its addresses: they name nothing in this process. Whatever a real GPU
would answer with an error, a crash or wrong numbers is refused here by an exception.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

FIRST, ALIGNMENT = 0x7A_0000_0000, 512
POISON = 0xFF  # as float32 and float16: NaN


class RefusedError(Exception):
    """The program did what it may not do. Never caught by the code under test."""


@dataclass
class Allocation:
    """A piece of device or page-locked memory.

    Attributes:
        filled: bytes from the start that mean something, and their dtype where an engine wrote them.
        users: what is queued and uses it.
    """

    base: int
    data: np.ndarray
    what: str = "memory"
    filled: int = 0
    dtype: str | None = None
    users: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)


@dataclass
class Work:
    """Something queued on a stream."""

    what: str
    uses: list[Allocation]
    do: Callable[[], None]


class Device:
    """One GPU.

    Args:
        memory: bytes of it.
    """

    def __init__(self, memory: int = 1 << 30) -> None:
        self.memory = memory
        self.device: dict[int, Allocation] = {}
        self.host: dict[int, Allocation] = {}
        self.streams: dict[int, list[Work]] = {}
        self.copies: list[tuple[str, int]] = []  # direction and bytes of every copy
        self.peak = 0
        self._freed: list[tuple[int, int]] = []
        self._next, self._next_stream = FIRST, 0x51
        self._keep: list[object] = []

    @property
    def used(self) -> int:
        return sum(each.size for each in self.device.values())

    # Memory

    def allocate(self, size: int, what: str = "memory") -> int | None:
        """Address, or None where the memory is full."""
        if size <= 0:
            raise RefusedError(f"an allocation of {size} bytes has no address")
        if self.used + size > self.memory:
            return None
        base = self._next
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT  # with a gap that belongs to nobody
        self.device[base] = Allocation(base, np.full(size, POISON, np.uint8), what)
        self.peak = max(self.peak, self.used)
        return base

    def free(self, address: int) -> None:
        allocation = self._base(self.device, address)
        del self.device[address]
        self._freed.append((address, allocation.size))

    def allocate_host(self, size: int) -> int:
        if size <= 0:
            raise RefusedError(f"an allocation of {size} bytes has no address")
        memory = (ctypes.c_uint8 * size)()
        address = ctypes.addressof(memory)
        self._keep.append(memory)  # for ever: a read after the free must not crash the tests
        self.host[address] = Allocation(address, np.frombuffer(memory, np.uint8), "page-locked memory")
        return address

    def free_host(self, address: int) -> None:
        allocation = self._base(self.host, address)
        allocation.data[:] = POISON
        del self.host[address]

    def _base(self, known: dict[int, Allocation], address: int) -> Allocation:
        allocation = known.get(address)
        if allocation is None:
            if any(base == address for base, _ in self._freed):
                raise RefusedError(f"{address:#x} is freed twice")
            raise RefusedError(f"{address:#x} was never allocated so; it cannot be freed")
        if allocation.users:
            raise RefusedError(f"{address:#x} is freed while {allocation.users[0]} is queued and uses it")
        return allocation

    def find(self, address: int, size: int, what: str) -> Allocation:
        """The device memory that holds `size` bytes from an address on, which must be its first."""
        if not isinstance(address, int):
            raise RefusedError(f"{what}: {address!r} is no address")
        if not address:
            raise RefusedError(f"{what}: its address is null")
        if address in self.device:
            allocation = self.device[address]
            if allocation.size < size:
                raise RefusedError(f"{what}: {size} bytes do not fit the {allocation.size} at {address:#x}")
            return allocation
        if any(base <= address < base + length for base, length in self._freed):
            raise RefusedError(f"{what}: {address:#x} is used after it was freed")
        if any(0 <= address - each.base < each.size for each in self.host.values()):
            raise RefusedError(f"{what}: {address:#x} is an address of the host, not of the device")
        raise RefusedError(f"{what}: nothing was allocated at {address:#x}")

    def find_host(self, address: int, size: int, what: str) -> tuple[Allocation, int]:
        """The page-locked memory that holds `size` bytes from an address on, and where in it they begin."""
        for allocation in self.host.values():
            start = address - allocation.base
            if 0 <= start < allocation.size:
                if start + size > allocation.size:
                    raise RefusedError(f"{what}: {size} bytes reach beyond the {allocation.size} there are")
                return allocation, start
        raise RefusedError(f"{what}: {address:#x} is not page-locked host memory")

    # Work

    def create_stream(self) -> int:
        handle, self._next_stream = self._next_stream, self._next_stream + 1
        self.streams[handle] = []
        return handle

    def destroy_stream(self, handle: int) -> None:
        if self.stream(handle):
            raise RefusedError(
                f"stream {handle:#x} is destroyed before {self.streams[handle][0].what} was done"
            )
        del self.streams[handle]

    def stream(self, handle: int) -> list[Work]:
        if not handle:
            raise RefusedError("the default stream makes TensorRT wait for the whole device; create one")
        if handle not in self.streams:
            raise RefusedError(f"{handle:#x} is no stream")
        return self.streams[handle]

    def queue(self, handle: int, work: Work) -> None:
        self.stream(handle).append(work)
        for allocation in work.uses:
            allocation.users.append(work.what)

    def synchronize(self, handle: int) -> None:
        """Does what is queued. A failure leaves nothing queued, as a real one does."""
        works = self.stream(handle)
        try:
            for work in works:
                work.do()
        finally:
            for work in works:
                for allocation in work.uses:
                    allocation.users.remove(work.what)
            works.clear()

    def upload(self, address: int, host: int, size: int, handle: int) -> None:
        target = self.find(address, size, "a copy to the device")
        source, start = self.find_host(host, size, "a copy to the device")
        before = source.data[start : start + size].copy()

        def copy() -> None:
            if not np.array_equal(source.data[start : start + size], before):
                raise RefusedError("host memory changed while a copy from it was queued")
            target.data[:size] = before
            target.filled, target.dtype = size, None

        self.copies.append(("up", size))
        self.queue(handle, Work("a copy to the device", [target, source], copy))

    def download(self, host: int, address: int, size: int, handle: int) -> None:
        source = self.find(address, size, "a copy from the device")
        target, start = self.find_host(host, size, "a copy from the device")
        target.data[start : start + size] = POISON  # whoever reads before waiting reads this

        def copy() -> None:
            if source.filled < size:
                raise RefusedError(
                    f"{size} bytes are copied from {source.base:#x}, where {source.filled} were written"
                )
            target.data[start : start + size] = source.data[:size]

        self.copies.append(("down", size))
        self.queue(handle, Work("a copy from the device", [source, target], copy))

    def assert_clean(self) -> None:
        """Nothing is left: no memory, no stream, no work."""
        left = [f"{each.size} bytes of {each.what}" for each in (*self.device.values(), *self.host.values())]
        left += [f"stream {handle:#x}" for handle in self.streams]
        if left:
            raise RefusedError(f"left at the end: {', '.join(left)}")
