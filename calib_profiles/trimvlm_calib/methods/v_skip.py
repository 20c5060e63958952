"""V-Skip: visual rows do no attention in the layers where that changes the prediction least.

"Look Less, Reason More", section 3: VIG(l) = KL(full || layer l bypassed) at the last prompt row, over
samples of one task (`trimvlm calibrate --task`); a profile of one task applied to all is the paper's
universal V-Skip* (appendix E). Keys and values of visual tokens stay, the FFN runs, no token is removed;
decode is unchanged.

The paper's comparisons are parameters: other ways to find the layers (figure 5), and FFN-Skip (table 4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.outcome import Curve, Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "v-skip"
SUMMARY = "visual rows skip attention in the layers of lowest VIG (V-Skip, section 3)"
SAMPLES = 20

MINIMUM = 1e-6  # a share that rounds to no layers still means one


class Parameters(Value, frozen=True, kw_only=True):
    """Published settings as shares of the depth: 19 of 32 layers (7B), 24 of 40 (13B).

    Attributes:
        share: share of the layers to skip, rounded to whole layers.
        skip: what visual rows do not do there: `attention`, or `ffn` (FFN-Skip, the ablation).
        identify: how the layers are found. `vig`; `logits`: highest cosine between the logits of the full
            and of the bypassed model (the paper's CosSim); `cosine`: highest cosine between visual rows
            before and after the sub-layer in the full model; `random`: drawn with `seed`, not measured.
        seed: of `random`.
    """

    share: float = 19 / 32
    skip: Literal["attention", "ffn"] = "attention"
    identify: Literal["vig", "logits", "cosine", "random"] = "vig"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share: {self.share} is not within 0 (excluded) and 1")
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")


def at_share(share: float) -> Parameters:
    """Leaves `share` of the layers as they are."""
    return Parameters(share=max(1 - share, MINIMUM))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Skips the layers that change least; of equal ones the lower layer."""
    depth = probe.spec.layers
    candidates = {layer: _bypass([layer], parameters.skip) for layer in range(depth)}
    curves: dict[str, Curve] = {}
    if parameters.identify == "vig":
        change = curves["vig"] = probe.sweep("VIG", candidates, "full||pruned")
    elif parameters.identify == "logits":
        change = curves["logit_distance"] = probe.sweep("logits", candidates, "cosine")
    elif parameters.identify == "cosine":
        curves["cosine"] = probe.sublayer_similarity(parameters.skip)
        change = tuple(None if value is None else -value for value in curves["cosine"])
    else:
        order = np.random.default_rng(parameters.seed).permutation(depth)
        change = tuple(float(place) for place in order)
    return Outcome(
        decisions=_bypass(lowest(change, parameters.share), parameters.skip),
        curves=curves,
    )


def lowest(curve: Curve, share: float) -> list[int]:
    """The layers with the lowest values, at least one, ascending."""
    count = max(1, round(share * len(curve)))
    return sorted(int(layer) for layer in np.argsort(np.array(curve, float), kind="stable")[:count])


def _bypass(layers: list[int], skip: str) -> Decisions:
    if skip == "ffn":
        return Decisions(layers=(LayerRule(layers=tuple(layers), ffn="none"),))
    return Decisions(layers=(LayerRule(layers=tuple(layers), query="none"),))
