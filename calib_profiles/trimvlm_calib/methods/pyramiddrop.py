"""PyramidDrop: the visual tokens shrink in stages, each ranked by its own layer's last-row attention.

Released code: stages before layers 8, 16 and 24 of 32 keep `int(576 r)` tokens with r = 1/2, 1/4, 1/8 of the
*original* count. The score is an auxiliary attention with the stage layer's own norm, Wq and Wk, mean over
heads, last prompt row. Position ids are renumbered after every drop, also at decode.

Layers and ratios are taken as given. What each stage costs is measured all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention
from trimvlm.value import Value
from trimvlm_calib.depth import check_shares, layers_at
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "pyramiddrop"
SUMMARY = "visual tokens shrink in stages, by the stage layer's own attention (PyramidDrop, section 3)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published for 32 layers: before layers 8, 16, 24; a half, a quarter, an eighth of the tokens.

    Attributes:
        layers: stage layers as shares of the depth.
        keep: shares of the original count, rounded down to whole tokens, at least one.
        positions: the code renumbers position ids (`compact`); `persistent` keeps them.
    """

    layers: tuple[float, ...] = (8 / 32, 16 / 32, 24 / 32)
    keep: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8)
    positions: Literal["compact", "persistent"] = "compact"

    def __post_init__(self) -> None:
        check_shares("layers", self.layers, "rising")
        check_shares("keep", self.keep, "falling")
        if len(self.layers) != len(self.keep):
            raise UserError(f"keep: {len(self.keep)} budgets for {len(self.layers)} layers; give one each")


def at_share(share: float) -> Parameters:
    """Keeps `share` of what is left, stage after stage: a half is the published pyramid."""
    return Parameters(keep=(share, share**2, share**3))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Takes the stages as given and measures KL(pruned || full) after each further stage.

    Raises:
        UserError: the model has too few layers.
    """
    layers = layers_at("layers", parameters.layers, probe.spec.layers)
    selects = tuple(
        Select(
            layer=layer,
            keep=max(1, int(share * probe.spec.visual_tokens)),
            by=LastRowAttention(attention="own"),
        )
        for layer, share in zip(layers, parameters.keep, strict=True)
    )
    stages = {
        select.layer: Decisions(select=selects[: number + 1], positions=parameters.positions)
        for number, select in enumerate(selects)
    }
    curve = probe.sweep("PyramidDrop", stages, "pruned||full")
    return Outcome(decisions=stages[layers[-1]], curves={"kl_stage": curve})
