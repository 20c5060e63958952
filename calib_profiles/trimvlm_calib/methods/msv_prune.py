"""MSV-Prune: the first stage of SPIDER, before the decoder. Nothing is measured.

Published for CLIP's 24 layers: middle features are those of layer 12, last ones of layer 24. Which layer's
attention ranks anchors is not said; here it is the last that the projector's features come through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.encoder_rules import EncoderRule, MsvPrune, Tower
from trimvlm.value import Value
from trimvlm_calib.encoder_stage import check_keep, decide, last_used
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "msv-prune"
SUMMARY = "anchors by [CLS] attention, the least alike of the rest, before the decoder (SPIDER, section 3.1)"
SAMPLES = 0


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 144 of 576 tokens, 70 % of them anchors, 4 clusters.

    Attributes:
        keep: share of the visual tokens that stays (up to 1), or their number.
        anchors: share of these that is chosen by attention.
        clusters: of the rest; no more than there are tokens to share among them.
        iterations: of K-means; not published.
        received: rank by the attention that patches receive, for towers without [CLS].
        attention, middle, last: layers; None: the published ones, as shares of the depth.
    """

    keep: float = 1 / 4
    anchors: float = 0.7
    clusters: int = 4
    iterations: int = 10
    received: bool = False
    attention: int | None = None
    middle: int | None = None
    last: int | None = None

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
        missing = budget - int(budget * parameters.anchors)
        return MsvPrune(
            anchors=parameters.anchors,
            clusters=min(parameters.clusters, max(missing, 1)),
            iterations=parameters.iterations,
            attention=last_used(tower) if parameters.attention is None else parameters.attention,
            received=parameters.received,
            middle=round(tower.layers * 12 / 24) if parameters.middle is None else parameters.middle,
            last=tower.layers if parameters.last is None else parameters.last,
        )

    return decide(probe, parameters.keep, rule)
