"""The token loop: prefill, then one token at a time, with any function for a decoder.

A decoder is a function from named inputs to named outputs, as listed in `bundle.py`. Inputs that are left
out have zero rows, so the loop names only what it has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.text import Prompt


def prefill_inputs(
    prompt: Prompt, visual_ND: NDArray[np.floating], forced: Sequence[NDArray[np.int64]] = ()
) -> dict[str, Any]:
    """Inputs of the first run: all rows of the prompt, no past; `forced`: indices of each selection."""
    assert len(visual_ND) == len(prompt.visual_positions), "one visual row per visual position"
    return {
        "input_ids": prompt.input_ids,
        "visual": visual_ND,
        "text_positions": prompt.text_positions,
        "visual_positions": prompt.visual_positions,
        **{f"forced.{stage}": indices for stage, indices in enumerate(forced)},
    }


def step_inputs(token: int, position: int, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a decode step: one text row, and as its past what the run before left as present.

    Args:
        position: of the token in the full, unpruned sequence.
        outputs: of the run before.
    """
    past = {
        name.replace("present_", "past_", 1): value
        for name, value in outputs.items()
        if name.startswith("present_")
    }
    return {
        "input_ids": np.array([token], np.int64),
        "text_positions": np.array([position], np.int64),
        **past,
    }


def generate_ids(
    decoder: Callable[[dict[str, Any]], Mapping[str, Any]],
    prompt: Prompt,
    visual_ND: NDArray[np.floating],
    sampler: Callable[[NDArray[np.floating]], int],
    *,
    eos_ids: Collection[int],
    max_new_tokens: int,
) -> Iterator[int]:
    """Yields the answer's token ids, without the end-of-sequence token.

    The decoder runs once per token that is needed: not after the last one.
    """
    outputs = decoder(prefill_inputs(prompt, visual_ND))
    for count in range(1, max_new_tokens + 1):
        token = sampler(outputs["logits"][0])
        if token in eos_ids:
            return
        yield token
        if count < max_new_tokens:
            outputs = decoder(step_inputs(token, prompt.length + count - 1, outputs))
