"""Memory that lasts as long as a backend is open: pools of device buffers, and one page-locked host buffer.

Every tensor has a pool of its own. A buffer is leased for a run, or for as long as somebody keeps the output
that is in it, so that an output is never overwritten while it can still be fed to a run.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends.cuda import Cuda

ALIGNMENT = 256  # of every address that TensorRT is given


class Pool:
    """Device buffers for one tensor.

    Args:
        what: the tensor, for messages.
        size: bytes of a buffer; a larger request gets a larger one.
    """

    def __init__(self, cuda: Cuda, what: str, size: int) -> None:
        self.what, self.size = what, aligned(size)
        self._cuda = cuda
        self._sizes: dict[int, int] = {}  # of every buffer, by address
        self._idle: list[int] = []

    def reserve(self, count: int) -> None:
        """Makes sure that there are so many buffers.

        Raises:
            UserError: the device is out of memory.
        """
        while len(self._sizes) < count:
            self._idle.append(self._allocate())

    def take(self, size: int) -> Lease:
        """A buffer of at least `size` bytes, never none: TensorRT wants an address for empty tensors too.

        Raises:
            UserError: the device is out of memory.
        """
        self.size = max(self.size, aligned(size))
        for address in [each for each in self._idle if self._sizes[each] < self.size]:
            self._idle.remove(address)
            self._free(address)
        return Lease(self, self._idle.pop() if self._idle else self._allocate())

    def give_back(self, address: int) -> None:
        """Takes a leased buffer back; a pool that was closed has no more use for it."""
        if address in self._sizes:
            self._idle.append(address)

    def close(self) -> None:
        """Frees every buffer, leased or not."""
        for address in list(self._sizes):
            self._free(address)
        self._idle.clear()

    def holds(self, address: int) -> bool:
        """Whether a buffer is one of this pool's, and not yet freed."""
        return address in self._sizes

    def _allocate(self) -> int:
        address = self._cuda.allocate(self.size, self.what)
        self._sizes[address] = self.size
        return address

    def _free(self, address: int) -> None:
        del self._sizes[address]
        self._cuda.free(address)


class Lease:
    """A buffer in use. It goes back to its pool when it is released, or forgotten."""

    def __init__(self, pool: Pool, address: int) -> None:
        self.pool, self.address = pool, address
        self._held = True

    @property
    def valid(self) -> bool:
        """Whether the buffer is still there: its backend is open."""
        return self._held and self.pool.holds(self.address)

    def release(self) -> None:
        """Gives the buffer back."""
        if self._held:
            self._held = False
            self.pool.give_back(self.address)

    __del__ = release


class Staging:
    """Page-locked host memory between arrays and the device: filled and read in pieces, run by run."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._address = self._size = self._used = 0

    def start(self, size: int) -> None:
        """Makes room for a run whose pieces take `size` bytes, each aligned; what was there is gone.

        No copy from or to the memory may be queued.
        """
        self._used = 0
        if size > self._size:
            self.close()
            self._address = self._cuda.allocate_host(size)
            self._size = size

    def piece(self, size: int) -> tuple[int, NDArray[np.uint8]]:
        """Address and bytes of the next piece."""
        start, self._used = self._used, self._used + aligned(size)
        assert self._used <= self._size, f"{self._used} bytes are more than the {self._size} asked for"
        address = self._address + start
        memory: Any = (ctypes.c_uint8 * size).from_address(address)
        return address, np.frombuffer(memory, np.uint8)

    def close(self) -> None:
        """Gives the memory back."""
        if self._size:
            self._cuda.free_host(self._address)
        self._address = self._size = self._used = 0


def aligned(size: int) -> int:
    """Bytes that a piece of `size` bytes takes; at least one unit, since nothing has no address."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT
