"""Random tokens at a layer: the same places for every input. A baseline for every rule that ranks.

At layer 0 this is FastV with K = 0, which its code treats as a random mask. Nothing is measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import RandomOrder
from trimvlm.value import Value
from trimvlm_calib.depth import budgets, check_share
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "random-select"
SUMMARY = "keep visual tokens by a seeded draw from a layer on (baseline; FastV with K = 0)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """FastV's share of a half, at its K = 0.

    Attributes:
        layer: first layer with fewer tokens.
        keep: share of the visual tokens that stays, rounded to whole tokens.
        seed: of the draw; see the rule `random`.
    """

    layer: int = 0
    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise UserError(f"layer: {self.layer} is negative")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")
        check_share("keep", self.keep)


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens."""
    return Parameters(keep=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Takes the parameters as given.

    Raises:
        UserError: the model has no such layer.
    """
    if parameters.layer >= probe.spec.layers:
        raise UserError(f"layer: {parameters.layer} is not within 0..{probe.spec.layers - 1}")
    (keep,) = budgets([parameters.keep], probe.spec.visual_tokens)
    select = Select(layer=parameters.layer, keep=keep, by=RandomOrder(seed=parameters.seed))
    return Outcome(decisions=Decisions(select=(select,)))
