"""What answers need of a device's memory, as values."""

from __future__ import annotations

from typing import Literal

from trimvlm.accounting import kv_bytes_per_layer
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_engines.fit.sizes import Request

MIB = 1 << 20
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
Basis = Literal["counted", "simulated", "measured", "fitted", "assumed"]


class Piece(Value, frozen=True, kw_only=True):
    """Some of the memory.

    Attributes:
        basis: counted from sizes that are known; simulated; a constant that was measured; a formula that was
            fitted to measurements; assumed.
    """

    name: str
    bytes: int
    basis: Basis
    note: str = ""


class Memory(Value, frozen=True, kw_only=True):
    """What one answer after another needs.

    Attributes:
        pieces: in memory at once when it is at its fullest.
        opening: most bytes while everything is loaded, before the first answer.
        taking_turns: the most where the decoder's engines and those before it are not in memory at once;
            None: they cannot take turns.
        at_once: what must be had in one piece each, the largest first.
    """

    pieces: tuple[Piece, ...]
    opening: int
    taking_turns: int | None
    at_once: tuple[Piece, ...]

    @property
    def peak(self) -> int:
        """The most at once."""
        return max(self.opening, sum(piece.bytes for piece in self.pieces))

    @property
    def least(self) -> int:
        """The most at once, with turns where that is less."""
        return self.peak if self.taking_turns is None else min(self.peak, self.taking_turns)


def kv_layers(schedule: Schedule, request: Request, value_bytes: int) -> tuple[int, ...]:
    """Bytes of keys and values that each layer holds at the end of the answer."""
    rows = request.text + request.new_tokens
    with_one = kv_bytes_per_layer(schedule, rows, value_bytes)
    of_image = kv_bytes_per_layer(schedule, 0, value_bytes)
    return tuple(a + (request.images - 1) * b for a, b in zip(with_one, of_image, strict=True))


def decodes(role: str) -> bool:
    """Whether a graph is the decoder, or a block of its layers."""
    return role.partition(".")[0] == "decoder"
