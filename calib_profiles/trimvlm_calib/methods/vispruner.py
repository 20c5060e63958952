"""VisPruner: important patches by [CLS] attention, diverse ones of the rest. Nothing is measured.

Published for the second last layer: its attention ranks, its output tells how alike two patches are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, Tower, VisPruner
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide, second_last
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "vispruner"
SUMMARY = "the most attended patches and diverse ones of the rest, before the decoder (VisPruner, section 3)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 128 of 576 tokens, half of them by attention.

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number.
        important: share of these that is chosen by attention.
        received: rank by the attention that patches receive, for towers without [CLS].
        attention, features: layer and hidden state; None: the published ones.
    """

    keep: float = 2 / 9
    important: float = 0.5
    received: bool = False
    attention: int | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens."""
    return Parameters(keep=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Turns shares into numbers.

    Raises:
        UserError: the tower has no such layer or no [CLS], or fewer patches than `keep`.
    """

    def rule(budget: int, tower: Tower) -> EncoderRule:
        layer = second_last(tower)
        return VisPruner(
            important=parameters.important,
            attention=layer if parameters.attention is None else parameters.attention,
            received=parameters.received,
            features=layer + 1 if parameters.features is None else parameters.features,
        )

    return decide(probe, parameters.keep, rule)
