"""Which of an engine's shape ranges a run takes, and what to do where none fits.

TensorRT calls a set of shape ranges an optimisation profile. An engine has one for prefill and decode
together, or one each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from trimvlm.errors import UserError

Shape: TypeAlias = tuple[int, ...]

# What a larger range of an input comes from: the limits of a target.
_LIMITS = {
    "input_ids": "limits.text",
    "text_": "limits.text",
    "past_": "limits.new_tokens (or limits.text)",
    "": "limits.images",
}


class Range(NamedTuple):
    """Smallest and largest shape of an input."""

    min: Shape
    max: Shape

    def admits(self, shape: Shape) -> bool:
        """Whether every dimension lies within."""
        return len(shape) == len(self.max) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


def choose(role: str, ranges: Sequence[Mapping[str, Range]], shapes: Mapping[str, Shape]) -> int:
    """Number of the set of ranges that admits all shapes; of several the one with the smallest maxima, whose
    kernels were chosen for less.

    Raises:
        UserError: none does; it names an input, its shape, the range and the limit that the range is made of.
    """
    fitting = [
        number
        for number, each in enumerate(ranges)
        if all(each[name].admits(shape) for name, shape in shapes.items())
    ]
    if fitting:
        return min(fitting, key=lambda number: sum(prod(each.max) for each in ranges[number].values()))
    widest = max(ranges, key=lambda each: sum(each[name].admits(shape) for name, shape in shapes.items()))
    name, shape = next((name, shape) for name, shape in shapes.items() if not widest[name].admits(shape))
    raise UserError(
        f"the {role} engine takes {name} of {list(widest[name].min)} to {list(widest[name].max)}, not "
        f"{list(shape)}; ask for less (shorter text, fewer images or new tokens), or build it for a target "
        f"with larger {limit(name)}"
    )


def limit(name: str) -> str:
    """The limit of a target that the range of an input follows from."""
    return next(said for prefix, said in _LIMITS.items() if name.startswith(prefix))
