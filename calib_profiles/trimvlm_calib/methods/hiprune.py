"""HiPrune: anchors of a middle layer with their neighbours, filled up by a deep one. Nothing is measured.

Published for CLIP's 24 layers: the ninth and the second last. Both rank by received attention, so that a
tower needs no [CLS].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, HiPrune, Tower
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide, second_last
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "hiprune"
SUMMARY = "anchors of a middle layer with their neighbours, then a deep one, before the decoder (HiPrune)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 192 of 576 tokens, a tenth of them for anchors with their neighbours.

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number.
        alpha: share of these for anchors with their four neighbours.
        object_layer, deep_layer: layers; None: the published ones, as shares of the depth.
    """

    keep: float = 1 / 3
    alpha: float = 0.1
    object_layer: int | None = None
    deep_layer: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens."""
    return Parameters(keep=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Turns shares into numbers.

    Raises:
        UserError: the tower has no such layer, or fewer patches than `keep`.
    """

    def rule(budget: int, tower: Tower) -> EncoderRule:
        middle = min(round(tower.layers * 8 / 24), tower.layers - 1)
        return HiPrune(
            alpha=parameters.alpha,
            object_layer=middle if parameters.object_layer is None else parameters.object_layer,
            deep_layer=second_last(tower) if parameters.deep_layer is None else parameters.deep_layer,
        )

    return decide(probe, parameters.keep, rule)
