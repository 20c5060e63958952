"""The router (Pruning All-Rounder, section 4): a small network that scores visual tokens and decoder layers
for one prompt, before the decoder runs.

Its graph (T text rows, N visual rows, D width, R layer tokens, one for each of the model's last R layers):

    input_ids int64 [T], visual float [N, D], text_positions int64 [T], visual_positions int64 [N]
    -> router_scores float32 [N], layer_scores float32 [R]

A prompt without images has one visual row, of zeros at position `NOWHERE`, which no other row sees: libraries
may not execute empty tensors (`trimvlm.filling`).

Scores are log-odds of being kept: before the sigmoid, which keeps their order and would round large ones to
equal values. Token scores go to the decoder's selections by `router`. Layer scores choose among members: a
few profiles that differ in the layers that they execute and share one router and one set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trimvlm.backends import Backend
from trimvlm.filling import NOWHERE

if TYPE_CHECKING:
    from trimvlm.router_spec import Choice
    from trimvlm.text import Prompt
    from trimvlm.timings import Timings


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the router says of one prompt: tokens float32 [N], layers float32 [R]."""

    tokens: NDArray[np.float32]
    layers: NDArray[np.float32]


Route: TypeAlias = "Callable[[Prompt, NDArray[np.floating], Timings], Scores]"


def make_route(backend: Backend) -> Route:
    """Resolves a backend's router graph into a function.

    Args:
        backend: is open when the function is called.

    Returns:
        `route(prompt, visual_ND, timings)`: adds its seconds to `select`.
    """

    def route(prompt: Prompt, visual_ND: NDArray[np.floating], timings: Timings) -> Scores:
        start = perf_counter()
        count, places, port = len(visual_ND), prompt.visual_positions, backend.inputs("router")["visual"]
        if not count:
            visual_ND, places = np.zeros((1, visual_ND.shape[1])), np.array([NOWHERE], np.int64)
        feeds = {
            "input_ids": prompt.input_ids,
            "visual": visual_ND.astype(port.dtype, copy=False),
            "text_positions": prompt.text_positions,
            "visual_positions": places,
        }
        found = backend.run("router", feeds, ["router_scores", "layer_scores"])
        timings.select = (timings.select or 0.0) + perf_counter() - start
        return Scores(tokens=found["router_scores"][:count], layers=found["layer_scores"])

    return route


@dataclass(frozen=True, kw_only=True)
class Picked:
    """What decodes one prompt: a profile, and token scores float32 [N] where its decoder takes them."""

    profile: str
    router_scores: NDArray[np.float32] | None = None


Pick: TypeAlias = "Callable[[Prompt, NDArray[np.floating], Timings], Picked]"


def make_pick(backends: Mapping[str, Backend], choice: Choice | None, layers: int) -> Pick:
    """Resolves the profiles that a session may run into a function.

    Args:
        backends: by profile, with its decoder; the first has the router graph, if there is one. They are open
            when the function is called.
        choice: its members are the profiles; None: there is one profile.
        layers: decoder layers of the model.

    Returns:
        `pick(prompt, visual_ND, timings)`; runs the router only where something depends on it.
    """
    first = next(iter(backends))
    route = make_route(backends[first])

    def pick(prompt: Prompt, visual_ND: NDArray[np.floating], timings: Timings) -> Picked:
        ranks = {profile: "router_scores" in each.inputs("decoder") for profile, each in backends.items()}
        if choice is None and not ranks[first]:
            return Picked(profile=first)
        scores = route(prompt, visual_ND, timings)
        profile = choose(scores.layers, choice.members, layers) if choice else first
        return Picked(profile=profile, router_scores=scores.tokens if ranks[profile] else None)

    return pick


def choose(layer_scores_R: NDArray[np.float32], members: Mapping[str, tuple[int, ...]], layers: int) -> str:
    """The member that the router holds most likely: the highest sum of scores over the layers it executes.

    Args:
        layer_scores_R: scores of the last R of the model's `layers` layers.
        members: as in `Choice`; of equal ones the first wins.
    """
    first = layers - len(layer_scores_R)

    def likelihood(name: str) -> float:
        return float(sum(float(layer_scores_R[layer - first]) for layer in members[name]))

    return max(members, key=likelihood)
