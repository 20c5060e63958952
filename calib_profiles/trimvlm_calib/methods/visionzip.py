"""VisionZip: [CLS], the most attended patches, and rows merged from the others. Nothing is measured.

Published for the second last layer: its attention ranks, its keys tell how alike two patches are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, Tower, VisionZip
from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide, second_last
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "visionzip"
SUMMARY = "[CLS], the most attended patches and merged rows of the rest, before the decoder (VisionZip)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 64 of 576 rows, 10 of them merged (and in the same proportion for 128 and 192).

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number; [CLS] counts.
        contextual: share of these rows that is merged, rounded.
        attention, keys: layers; None: the published ones.
    """

    keep: float = 1 / 9
    contextual: float = 10 / 64
    attention: int | None = None
    keys: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not 0 <= self.contextual < 1:
            raise UserError(f"contextual: {self.contextual} is not a share within 0 and 1 (excluded)")


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
        return VisionZip(
            contextual=min(round(parameters.contextual * budget), budget - 1),
            attention=layer if parameters.attention is None else parameters.attention,
            keys=layer if parameters.keys is None else parameters.keys,
        )

    return decide(probe, parameters.keep, rule)
