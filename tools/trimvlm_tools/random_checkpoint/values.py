"""Random values of any tensor from one block: fresh ones for 7B parameters would take minutes.

Element i of a tensor is block[(offset + i) mod P] * deviation + mean, with the offset from the seed and the
tensor's name. P is a prime, so that no row of a matrix is equal to another one: equal rows would tie logits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from trimvlm_tools.random_checkpoint.description import Dtype

PERIOD = 4_194_301  # elements; prime
SMALL = 0.02  # deviation of vectors, so that a bias or norm that is left out shows


@dataclass(frozen=True, kw_only=True)
class RandomTensor:
    """A tensor of normal values.

    Attributes:
        name: as in the weight file.
        drawn_as: the name that decides the values: the saved one, whatever the file calls it.
        mean, deviation: fan_in^-1/2 of a matrix keeps activations of order one in any width and so finite in
            float16; a vector is around what the model's own initialisation makes constant (norms 1,
            biases 0).
    """

    name: str
    drawn_as: str
    shape: tuple[int, ...]
    mean: float
    deviation: float

    @property
    def elements(self) -> int:
        """How many values."""
        return prod(self.shape)


def stream(tensor: RandomTensor, dtype: Dtype, seed: int) -> Iterator[memoryview]:
    """The tensor's bytes, little-endian, in pieces of at most `PERIOD` elements; nothing is copied."""
    block = _block(seed, tensor.mean, tensor.deviation, dtype)
    width = len(block) // PERIOD
    digest = hashlib.sha256(f"{seed}:{tensor.drawn_as}".encode()).digest()
    start, left = int.from_bytes(digest[:8], "little") % PERIOD, tensor.elements
    while left:
        count = min(left, PERIOD - start)
        yield block[start * width : (start + count) * width]
        start, left = 0, left - count


@lru_cache(maxsize=8)  # a decoder layer takes three of them
def _block(seed: int, mean: float, deviation: float, dtype: Dtype) -> memoryview:
    import torch

    scaled = _normal(seed) * deviation + mean
    return scaled.to(getattr(torch, dtype)).view(torch.uint8).numpy().data


@lru_cache(maxsize=1)
def _normal(seed: int):
    import numpy as np
    import torch

    return torch.from_numpy(np.random.default_rng(seed).standard_normal(PERIOD, dtype=np.float32))
