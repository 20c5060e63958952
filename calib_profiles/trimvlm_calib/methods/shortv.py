"""ShortV: visual rows are frozen (no attention, no FFN) in the layers that contribute least.

LC(l) = KL(visual rows frozen in layer l || full) at the last prompt row, mean over the samples; the layers of
lowest LC are replaced. Keys and values of the frozen rows are computed and visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.methods.v_skip import MINIMUM, lowest
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "shortv"
SUMMARY = "visual rows are frozen in the layers of lowest layer contribution (ShortV)"
SAMPLES = 40


class Parameters(Value, frozen=True, kw_only=True):
    """Published settings as shares of the depth: 19 of 32 layers (7B), 24 of 40 (13B).

    Attributes:
        share: share of the layers to replace, rounded to whole layers.
    """

    share: float = 19 / 32

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share: {self.share} is not within 0 (excluded) and 1")


def at_share(share: float) -> Parameters:
    """Leaves `share` of the layers as they are."""
    return Parameters(share=max(1 - share, MINIMUM))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Replaces the layers with the lowest LC; of equal ones the lower layer."""
    candidates = {layer: _freeze([layer]) for layer in range(probe.spec.layers)}
    lc = probe.sweep("LC", candidates, "pruned||full")
    return Outcome(decisions=_freeze(lowest(lc, parameters.share)), curves={"lc": lc})


def _freeze(layers: list[int]) -> Decisions:
    return Decisions(layers=(LayerRule(layers=tuple(layers), query="none", ffn="none"),))
