"""Random patches before the decoder, the same for every image: what a rule has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.rules import RandomOrder
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "random-tokens"
SUMMARY = "keep patches by a seeded draw, before the decoder (baseline of the encoder stages)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """A quarter, as MSV-Prune.

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number.
        seed: of the draw; see the rule `random`.
    """

    keep: float = 1 / 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens."""
    return Parameters(keep=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Takes the parameters as given.

    Raises:
        UserError: an image has fewer patches than `keep`.
    """
    return decide(probe, parameters.keep, lambda budget, tower: RandomOrder(seed=parameters.seed))
