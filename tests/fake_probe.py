"""A probe that answers from given curves, for tests of what methods decide: no model runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from trimvlm.profile import ModelSpec
from trimvlm.schedule import resolve
from trimvlm_calib.calibrate import read_parameters
from trimvlm_calib.methods import find

SPEC = ModelSpec(
    family="llava",
    layers=32,
    hidden=64,
    heads=4,
    kv_heads=4,
    head_dim=16,
    ffn=96,
    vocab=64,
    visual_tokens=576,
)


class FakeProbe:
    """Answers with `divergences[layer]`, and remembers what it was asked."""

    def __init__(self, divergences=None, similarity=None, attention=None, spec=SPEC):
        self.spec, self.divergences, self.attention = spec, divergences, attention
        self.visual_similarity = lambda: similarity
        self.asked = {}

    def sweep(self, what, candidates, direction):
        self.asked[what] = (dict(candidates), direction)
        return tuple(
            self.divergences[layer] if layer in candidates else None for layer in range(self.spec.layers)
        )

    def measure(self, what, decisions, view, *, detail=False):
        self.asked[what] = decisions
        return np.array([view(SimpleNamespace(last_row=list(sample)), {}) for sample in self.attention])

    def visual_rows(self, inputs):
        return np.arange(self.spec.visual_tokens)

    def sublayer_similarity(self, sublayer):
        self.asked["similarity"] = sublayer
        return tuple(self.divergences)


def run(name, probe, **parameters):
    (method,) = find(name).values()
    outcome = method.calibrate(probe, read_parameters({name: method}, parameters)[name])
    resolve(outcome.decisions, probe.spec)
    return outcome
