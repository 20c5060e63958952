"""V-Skip: visual rows do no attention in the layers where that changes the prediction least.

"Look Less, Reason More", section 3: VIG(l) = KL(full || layer l bypassed) at the last prompt row. Keys and
values of visual tokens stay, the FFN runs, no token is removed; decode is unchanged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "v-skip"
SUMMARY = "visual rows skip attention in the layers of lowest VIG (V-Skip, section 3)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published settings as shares of the depth: 19 of 32 layers (7B), 24 of 40 (13B).

    Attributes:
        share: share of the layers to skip, rounded to whole layers.
    """

    share: float = 19 / 32

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share: {self.share} is not within 0 (excluded) and 1")


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Skips the layers with the lowest VIG; of equal ones the lower layer."""
    candidates = {layer: _bypass([layer]) for layer in range(probe.spec.layers)}
    vig = probe.sweep("VIG", candidates, "full||pruned")
    return Outcome(decisions=_bypass(lowest(vig, parameters.share)), curves={"vig": vig})


def lowest(curve: tuple[float | None, ...], share: float) -> list[int]:
    """The layers with the lowest values, at least one, ascending."""
    count = max(1, round(share * len(curve)))
    return sorted(int(layer) for layer in np.argsort(np.array(curve, float), kind="stable")[:count])


def _bypass(layers: list[int]) -> Decisions:
    return Decisions(layers=(LayerRule(layers=tuple(layers), query="none"),))
