"""LLaVA-PruMerge with a fixed number of rows: kept tokens, each with its nearest added. Nothing is measured.

Published with a number of tokens that follows from each image's outliers; here it is fixed, by default at
their published mean. Attention and keys are those of the tower's last layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, PruMerge, Tower
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "prumerge"
SUMMARY = "the most attended patches, each with its nearest merged in, before the decoder (LLaVA-PruMerge)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 32 of 576 rows on average, 32 neighbours.

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number; the row of the rest counts.
        neighbours: patches merged into each kept one; no more than there are others.
        layer: whose attention and keys are read; None: the last.
    """

    keep: float = 1 / 18
    neighbours: int = 32
    layer: int | None = None

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
        return PruMerge(
            neighbours=min(parameters.neighbours, tower.patches - 1),
            layer=tower.layers - 1 if parameters.layer is None else parameters.layer,
        )

    return decide(probe, parameters.keep, rule, least=2)
