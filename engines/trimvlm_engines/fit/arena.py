"""ONNX Runtime's arena for scratch memory and what a run's values take of it.

The rules of its `BFCArena` as it is set up for the CPU: pieces of 256 bytes; the smallest free chunk that is
large enough, the lowest of equals; a chunk twice as large, or larger by 128 MiB, is split; neighbours that
are free are joined; regions double from 2 MiB to 1 GiB. A page of a region counts from the first time that a
chunk reaches over it: the system gives it then, and the arena never gives it back by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

UNIT = 256
SPLIT = 128 << 20
FIRST, LARGEST = 2 << 20, 1 << 30


@dataclass
class Chunk:
    """A piece of a region, with the ones before and after it."""

    region: int
    start: int
    size: int
    free: bool = True
    before: Chunk | None = None
    after: Chunk | None = None


class Arena:
    """Memory that is taken and given back in pieces.

    Attributes:
        taken: bytes in use now.
        resident: bytes that were ever in use at once, gaps between them included.
    """

    def __init__(self) -> None:
        self.taken = 0
        self._next = FIRST
        self._chunks: list[Chunk] = []
        self._reached: list[int] = []

    @property
    def resident(self) -> int:
        return sum(self._reached)

    def take(self, size: int) -> Chunk:
        """The chunk that `size` bytes get."""
        size = max(1, -(-size // UNIT)) * UNIT
        fitting = [chunk for chunk in self._chunks if chunk.free and chunk.size >= size]
        chunk = (
            min(fitting, key=lambda one: (one.size, one.region, one.start)) if fitting else self._grow(size)
        )
        if chunk.size >= 2 * size or chunk.size - size >= SPLIT:
            rest = Chunk(chunk.region, chunk.start + size, chunk.size - size, before=chunk, after=chunk.after)
            if chunk.after:
                chunk.after.before = rest
            chunk.after, chunk.size = rest, size
            self._chunks.append(rest)
        chunk.free = False
        self.taken += chunk.size
        reached = chunk.start + size
        self._reached[chunk.region] = max(self._reached[chunk.region], reached)
        return chunk

    def give(self, chunk: Chunk) -> None:
        """Gives a chunk back; it is joined with free neighbours."""
        assert not chunk.free
        chunk.free = True
        self.taken -= chunk.size
        if chunk.after and chunk.after.free:
            self._join(chunk, chunk.after)
        if chunk.before and chunk.before.free:
            self._join(chunk.before, chunk)

    def _grow(self, size: int) -> Chunk:
        grown = self._next
        while grown < size:
            grown *= 2
        self._next = min(2 * grown, LARGEST) if grown == self._next else grown
        chunk = Chunk(len(self._reached), 0, grown)
        self._reached.append(0)
        self._chunks.append(chunk)
        return chunk

    def _join(self, first: Chunk, second: Chunk) -> None:
        first.size += second.size
        first.after = second.after
        if second.after:
            second.after.before = first
        self._chunks = [chunk for chunk in self._chunks if chunk is not second]


class Sum:
    """The same without gaps, for libraries that plan all buffers at once: `resident` is the highest sum."""

    def __init__(self) -> None:
        self.taken = 0
        self.resident = 0

    def take(self, size: int) -> int:
        """Counts `size` bytes."""
        self.taken += size
        self.resident = max(self.resident, self.taken)
        return size

    def give(self, chunk: int) -> None:
        """Gives back what `take` returned."""
        self.taken -= chunk
