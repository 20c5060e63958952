"""FastV: before layer K, keep the visual tokens that the last prompt row attended to most in layer K-1.

The published K and R are fixed, not searched for. What the choice costs is measured all the same: the
divergence for every K, so that a Profile shows whether another K would do better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention
from trimvlm.value import Value
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "fastv"
SUMMARY = "keep the most attended visual tokens from layer K on (FastV, section 4)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published: K = 2 for 32 and for 40 layers alike, half of the tokens removed.

    Attributes:
        layer: K, the first layer with fewer tokens; its scores are layer K-1's attention.
        keep: share of the visual tokens that stays, rounded to whole tokens.
    """

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise UserError(f"layer: {self.layer} is less than 1, the first layer that has one before it")
        if not 0 < self.keep <= 1:
            raise UserError(f"keep: {self.keep} is not within 0 (excluded) and 1")


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens."""
    return Parameters(keep=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Takes K as given and measures KL(pruned || full) for every K."""
    keep = max(1, round(parameters.keep * probe.spec.visual_tokens))
    if parameters.layer >= probe.spec.layers:
        raise UserError(f"layer: {parameters.layer} is not within 1..{probe.spec.layers - 1}")
    candidates = {layer: _drop(layer, keep) for layer in range(1, probe.spec.layers)}
    curve = probe.sweep("FastV", candidates, "pruned||full")
    return Outcome(decisions=_drop(parameters.layer, keep), curves={"kl_select": curve})


def _drop(layer: int, keep: int) -> Decisions:
    return Decisions(select=(Select(layer=layer, keep=keep, by=LastRowAttention(attention="previous")),))
