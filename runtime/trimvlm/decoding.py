"""The token loop: prefill, then one token at a time, with any function for a decoder.

A decoder is a function from named inputs to named outputs, as listed in `bundle.py`. Inputs that are left
out have zero rows, so the loop names only what it has. `Decoder` makes such a function of a backend's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import PAST_CACHES, Backend
from trimvlm.filling import FILLED, POSITIONS, fill, is_filled, strip
from trimvlm.mrope import Coordinates
from trimvlm.text import Prompt


def prefill_inputs(
    prompt: Prompt,
    visual_ND: NDArray[np.floating],
    forced: Sequence[NDArray[np.int64]] = (),
    *,
    places: Coordinates | None = None,
    forced_skip: Sequence[NDArray[np.int64]] = (),
    router_scores: NDArray[np.float32] | None = None,
) -> dict[str, Any]:
    """Inputs of the first run: all rows of the prompt, no past.

    Args:
        places: for a model with M-RoPE.
        forced, forced_skip: indices of each selection and skip stage, instead of the graph's own.
        router_scores: [N], for a graph that has this input.
    """
    assert len(visual_ND) == len(prompt.visual_positions), "one visual row per visual position"
    mrope = {"text_coordinates": places.text, "visual_coordinates": places.visual} if places else {}
    router = {} if router_scores is None else {"router_scores": router_scores}
    return {
        "input_ids": prompt.input_ids,
        "visual": visual_ND,
        "text_positions": prompt.text_positions,
        "visual_positions": prompt.visual_positions,
        **mrope,
        **router,
        **{f"forced.{stage}": indices for stage, indices in enumerate(forced)},
        **{f"forced_skip.{stage}": indices for stage, indices in enumerate(forced_skip)},
    }


def step_inputs(
    token: int, position: int, outputs: Mapping[str, Any], *, lag: int | None = None
) -> dict[str, Any]:
    """Inputs of a decode step: one text row, and as its past what the run before left as present.

    Args:
        position: of the token in the full, unpruned sequence.
        outputs: of the run before.
        lag: of `Coordinates`, for a model with M-RoPE.
    """
    mrope = {} if lag is None else {"text_coordinates": np.full((3, 1), position - lag, np.int64)}
    past = {
        name.replace("present_", "past_", 1): value
        for name, value in outputs.items()
        if name.startswith("present_")
    }
    return {
        "input_ids": np.array([token], np.int64),
        "text_positions": np.array([position], np.int64),
        **mrope,
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
    places: Coordinates | None = None,
    router_scores: NDArray[np.float32] | None = None,
) -> Iterator[int]:
    """Yields the answer's token ids, without the end-of-sequence token.

    The decoder runs once per token that is needed: not after the last one.
    """
    outputs = decoder(prefill_inputs(prompt, visual_ND, places=places, router_scores=router_scores))
    for count in range(1, max_new_tokens + 1):
        token = sampler(outputs["logits"][0])
        if token in eos_ids:
            return
        yield token
        if count < max_new_tokens:
            position = prompt.length + count - 1
            outputs = decoder(step_inputs(token, position, outputs, lag=places.lag if places else None))


class Outputs(dict[str, NDArray[Any]]):
    """All outputs of one decoder run by name, the position of the token that comes next, the profile that
    they are of, and with M-RoPE the lag of the coordinates."""

    def __init__(
        self, arrays: Mapping[str, NDArray[Any]], next_position: int, profile: str, lag: int | None
    ) -> None:
        super().__init__(arrays)
        self.lag = lag
        self.next_position = next_position
        self.profile = profile


@dataclass
class Decoder:
    """The decoder graph as a function of named inputs. What is left out gets zero rows.

    A filled graph (`trimvlm.filling`) takes and gives the same arrays here as an ordinary one.
    """

    backend: Backend
    fetch: Sequence[str]
    keep: Sequence[str] = ()
    empty: dict[str, NDArray[Any]] = field(init=False)
    beside_caches: dict[str, NDArray[Any]] = field(init=False)
    filled: bool = field(init=False)

    def __post_init__(self) -> None:
        ports = self.backend.inputs("decoder")
        self.filled = is_filled(ports)
        self.empty = {
            POSITIONS if name == FILLED else name: np.zeros([size or 0 for size in port.shape], port.dtype)
            for name, port in ports.items()
        }
        self.beside_caches = {name: none for name, none in self.empty.items() if not name.startswith("past_")}

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        feeds = {
            name: value.astype(self.empty[name].dtype, copy=False) if name == "visual" else value
            for name, value in inputs.items()
        }
        given = {**(self.beside_caches if PAST_CACHES in feeds else self.empty), **feeds}
        if not self.filled:
            return self.backend.run("decoder", given, self.fetch, self.keep)
        return strip(self.backend.run("decoder", fill(given), self.fetch, self.keep))
