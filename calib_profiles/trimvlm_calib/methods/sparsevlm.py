"""SparseVLM without merging: tokens are ranked by the attention of the text rows that look at the image most.

Which text rows rate is fixed by the embeddings (see `TextAttention`); scores are the attention of layers 2, 6
and 15, after which the selection takes place, so it acts at the input of layers 3, 7 and 16.

The released code has two versions. v1 merges part of what it drops into new rows and renumbers positions; v2
merges nothing and keeps positions. A Schedule holds no merged rows inside the decoder, so this is v2's form,
with v2's budgets. v2 also divides the attention by a map that depends on positions only, and reads 14 chosen
heads; here all heads count alike and nothing is divided, as in v1. The paper's adaptive rank is in neither.
A budget's name counts the layer that scores as already pruned; the mean over layers is higher (192: 206.75).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import TextAttention
from trimvlm.value import Value
from trimvlm_calib.depth import budgets, check_shares, layers_at
from trimvlm_calib.outcome import Outcome

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "sparsevlm"
SUMMARY = "visual tokens shrink in stages, by the attention of relevant text rows (SparseVLM v2, no merging)"
SAMPLES = 20

# Released budgets of v2, of 576 tokens, by the number that names them.
BUDGETS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}


class Parameters(Value, frozen=True, kw_only=True):
    """Published for 32 layers and 576 tokens.

    Attributes:
        tokens: names a released set of budgets: 192, 128, 96 or 64; scaled to the model's visual tokens.
        keep: shares of the visual tokens instead, one per layer (v1's 192: 300, 200, 110 of 576).
        layers: layers at whose input a selection takes place, as shares of the depth.
    """

    tokens: int = 192
    keep: tuple[float, ...] | None = None
    layers: tuple[float, ...] = (3 / 32, 7 / 32, 16 / 32)

    def __post_init__(self) -> None:
        if self.tokens not in BUDGETS:
            raise UserError(f"tokens: {self.tokens} is not one of {', '.join(map(str, BUDGETS))}; give keep")
        check_shares("layers", self.layers, "rising")
        check_shares("keep", self.shares, "falling")
        if len(self.layers) != len(self.shares):
            raise UserError(f"keep: {len(self.shares)} budgets for {len(self.layers)} layers; give one each")

    @property
    def shares(self) -> tuple[float, ...]:
        """The budgets as shares of the visual tokens."""
        return self.keep or tuple(budget / 576 for budget in BUDGETS[self.tokens])


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens at the first stage, and at the others what the set for 192 has for it."""
    first = BUDGETS[192][0]
    return Parameters(keep=tuple(share * budget / first for budget in BUDGETS[192]))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Takes the stages as given and measures KL(pruned || full) after each further stage.

    Raises:
        UserError: the model has too few layers.
    """
    layers = layers_at("layers", parameters.layers, probe.spec.layers, first=1)
    keeps = budgets(parameters.shares, probe.spec.visual_tokens)
    selects = tuple(
        Select(layer=layer, keep=keep, by=TextAttention()) for layer, keep in zip(layers, keeps, strict=True)
    )
    stages = {select.layer: Decisions(select=selects[: number + 1]) for number, select in enumerate(selects)}
    curve = probe.sweep("SparseVLM", stages, "pruned||full")
    return Outcome(decisions=stages[layers[-1]], curves={"kl_stage": curve})
