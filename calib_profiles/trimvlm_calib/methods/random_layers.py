"""Random layers: whole layers skipped by a seeded draw. A baseline: a method that measures should beat it.

A skipped layer is skipped for all rows, at prefill and at decode (`execute: none`). Nothing is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.depth import check_share
from trimvlm_calib.methods.v_skip import MINIMUM
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "random-layers"
SUMMARY = "whole layers skipped by a seeded draw (baseline)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Pruning All-Rounder compares with 24 of 32 layers, drawn from the last half.

    Attributes:
        share: share of all layers to skip, rounded to whole layers, at least one.
        start: layers before this share of the depth always run.
        seed: of the draw (numpy's PCG64, `permutation`).
    """

    share: float = 8 / 32
    start: float = 16 / 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("share", self.share)
        if not 0 <= self.start < 1:
            raise UserError(f"start: {self.start} is not within 0 and 1 (excluded)")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")


def at_share(share: float) -> Parameters:
    """Keeps `share` of the layers, drawn from all of them."""
    return Parameters(share=max(1 - share, MINIMUM), start=0.0)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Draws the layers.

    Raises:
        UserError: more layers to skip than there are to draw from.
    """
    depth = probe.spec.layers
    first, count = round(parameters.start * depth), max(1, round(parameters.share * depth))
    if count > depth - first or count == depth:
        raise UserError(
            f"share: {count} of {depth} layers cannot be skipped from layer {first} on; "
            "give a smaller share or an earlier start"
        )
    order = np.random.default_rng(parameters.seed).permutation(depth - first) + first
    layers = tuple(sorted(int(layer) for layer in order[:count]))
    return Outcome(decisions=Decisions(layers=(LayerRule(layers=layers, execute="none"),)))
