"""The clock around a greedy loop that this side drives, the same for every peer whose loop is ours."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING

from trimvlm_tools.bench.peers import Decoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def decode_greedily(
    prefill: Callable[[], NDArray[np.float32]],
    step: Callable[[int, int], NDArray[np.float32]],
    rows: int,
    new_tokens: int,
) -> Decoded:
    """Runs a prompt and decodes from it; choosing a token is timed with the step that leads to it.

    Args:
        prefill: reads the prompt; float32 [V], logits of its last row.
        step: reads a token at a position (0-based) and returns the next logits, float32 [V].
        rows: of the prompt.
        new_tokens: at least 1, the one that prefill leads to included.
    """
    assert new_tokens > 0
    started = perf_counter()
    first_V = prefill()
    tokens = [int(first_V.argmax())]
    read = perf_counter()
    for position in range(rows, rows + new_tokens - 1):
        tokens.append(int(step(tokens[-1], position).argmax()))
    return Decoded(prefill=read - started, decode=perf_counter() - read, tokens=tokens, logits=first_V)
