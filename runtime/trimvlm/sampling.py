"""From logits to the next token: greedy, or drawn with temperature and nucleus (top-p)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trimvlm.errors import UserError


def make_sampler(
    temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Callable[[NDArray[np.floating]], int]:
    """Resolves the options once into a function from logits [V] to a token id.

    Args:
        temperature: 0 is greedy (the lowest id on ties); otherwise logits are divided by it.
        top_p: draw among the smallest set of most probable tokens that together reach this probability
            (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1); of equally
            probable ones the lower ids come first.
        seed: of the random numbers; the same seed draws the same tokens from the same logits.

    Returns:
        The sampler. It raises UserError where the logits are not finite (an overflow in the graph).

    Raises:
        UserError: an option outside its range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature: {temperature} is not a number from 0; 0 is greedy")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p} is not in (0, 1]; 1 keeps every token")
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; give 0 or more")

    def greedy(logits_V: NDArray[np.floating]) -> int:
        token = int(np.argmax(logits_V))
        _check(logits_V[token])
        return token

    random = np.random.default_rng(seed)

    def draw(logits_V: NDArray[np.floating]) -> int:
        peak = logits_V.max()
        _check(peak)
        weights_V = np.exp((logits_V.astype(np.float64) - peak) / temperature)
        order_V = np.argsort(-weights_V, kind="stable")
        reached_V = np.cumsum(weights_V[order_V])
        # A token is kept while the more probable ones together stay below top_p.
        keep = int(np.searchsorted(reached_V, top_p * reached_V[-1], side="left")) + 1
        reached_K = reached_V[:keep]
        drawn = np.searchsorted(reached_K, random.random() * reached_K[-1], side="right")
        return int(order_V[min(drawn, len(reached_K) - 1)])

    return draw if temperature else greedy


def _check(peak: float) -> None:
    if not math.isfinite(peak):
        raise UserError(
            "the decoder's logits are not finite; export in float32, or run trimvlm check to see which stage"
        )
