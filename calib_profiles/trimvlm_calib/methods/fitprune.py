"""FitPrune: how many tokens each layer deletes is fitted to a cost target with least change of attention.

Per sample and layer, with share alpha: of the tokens with the least cross attention (received from text
rows) as many may go as leave at least 1 - alpha of the dense mass, the same for self attention (received from
visual rows); the intersection is deleted, and a token that is gone stays gone. Attention is the maximum over
heads.
Counts are averaged over the samples and rounded down, as in the released code, and the least alpha whose
counts reach the target is taken (in steps of 1/128: the code's bisection ends within 0.01). No layer deletes
after the target is reached. The cost is MACV of the Schedule, which is the code's own formula.

One difference from the released search: it runs every sample anew for every alpha, each with its own tokens
deleted; here the masses are the dense model's, so one prefill per sample serves every alpha. At inference the
token ranking is cross attention times self attention, inside the layer (`CrossAndSelfAttention`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trimvlm.accounting import macv
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, ModelSpec, Select
from trimvlm.rules import CrossAndSelfAttention
from trimvlm.schedule import resolve
from trimvlm.value import Value
from trimvlm_calib.outcome import Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe
    from trimvlm_export.reference_record import Prefill

NAME = "fitprune"
SUMMARY = "per-layer deletions fitted to a cost target by attention mass (FitPrune, section 3)"
SAMPLES = 20

STEPS = 128  # alphas 1/128, 2/128, ..., 1


class Parameters(Value, frozen=True, kw_only=True):
    """Released schemes: 10 to 90 %.

    Attributes:
        reduction: share of the visual rows' multiply-accumulates (MACV) to save.
    """

    reduction: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise UserError(f"reduction: {self.reduction} is not within 0 and 1 (both excluded)")


def at_share(share: float) -> Parameters:
    """Spends `share` of the cost."""
    return Parameters(reduction=min(max(1 - share, 1e-3), 1 - 1e-3))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Finds the least alpha that reaches the target.

    Raises:
        UserError: no alpha does; the message gives what can be reached.
    """
    deletions_AL = _deletions(probe)
    dense = macv(resolve(Decisions(), probe.spec))
    reached = 0.0
    for counts_L in deletions_AL:
        decisions = scheme(counts_L, probe.spec, parameters.reduction)
        reached = 1 - macv(resolve(decisions, probe.spec)) / dense
        if reached >= parameters.reduction:
            keeps = {select.layer: select.keep for select in decisions.select}
            left, curve = probe.spec.visual_tokens, []
            for layer in range(probe.spec.layers):
                curve.append(float(left - keeps.get(layer, left)))
                left = keeps.get(layer, left)
            return Outcome(decisions=decisions, curves={"tokens_deleted": tuple(curve)})
    raise UserError(
        f"reduction: {parameters.reduction} cannot be reached on these samples; the most is "
        f"{round_figure(reached)}: give a smaller one"
    )


def scheme(counts_L: Sequence[int], spec: ModelSpec, reduction: float) -> Decisions:
    """Selections that delete `counts_L` tokens layer by layer, until the reduction of MACV is reached."""
    dense = macv(resolve(Decisions(), spec))
    selects: list[Select] = []
    left = spec.visual_tokens
    for layer, count in enumerate(counts_L):
        if 1 - macv(resolve(Decisions(select=tuple(selects)), spec)) / dense >= reduction:
            break
        if count := min(int(count), left - 1):
            left -= count
            selects.append(Select(layer=layer, keep=left, by=CrossAndSelfAttention()))
    return Decisions(select=tuple(selects))


def deletions(cross_LN: np.ndarray, self_LN: np.ndarray, alpha: float) -> list[int]:
    """How many tokens each layer deletes, for one sample's masses. At least one token stays."""
    alive = np.ones(cross_LN.shape[1], bool)
    counts = []
    for cross_N, self_N in zip(cross_LN, self_LN, strict=True):
        going = _least(cross_N, alive, alpha) & _least(self_N, alive, alpha)
        if going.sum() == alive.sum():
            going[np.argmax(np.where(alive, cross_N * self_N, -1))] = False
        alive &= ~going
        counts.append(int(going.sum()))
    return counts


def _least(mass_N: np.ndarray, alive: np.ndarray, alpha: float) -> np.ndarray:
    """The living tokens of least mass that leave at least 1 - alpha of the dense mass (bool [N])."""
    order = np.argsort(mass_N, kind="stable")
    order = order[alive[order]]
    left = mass_N[order].sum() - np.cumsum(mass_N[order])
    going = np.zeros(len(mass_N), bool)
    going[order[: int((left >= (1 - alpha) * mass_N.sum()).sum())]] = True
    return going


def _deletions(probe: Probe) -> np.ndarray:
    """Deletions int [STEPS, L], mean over samples, rounded down, for every alpha."""
    weights: list[np.ndarray] = []  # maximum over heads, per layer [S, S]

    def note(module: Any, args: tuple, output: tuple) -> None:
        weights.append(output[1][0].float().amax(dim=0).cpu().numpy())

    def view(run: Prefill, inputs: Mapping[str, Any]) -> np.ndarray:
        visual = probe.visual_rows(inputs)
        masses = [attention_masses(each, visual) for each in weights[-probe.spec.layers :]]
        weights.clear()
        cross_LN, self_LN = (np.stack(each) for each in zip(*masses, strict=True))
        steps = [deletions(cross_LN, self_LN, (step + 1) / STEPS) for step in range(STEPS)]
        return np.concatenate(steps)

    hooks = [layer.self_attn.register_forward_hook(note) for layer in probe.model.model.language_model.layers]
    try:
        figures_BK = probe.measure("attention masses", Decisions(), view)
    finally:
        for hook in hooks:
            hook.remove()
    return np.floor(figures_BK.mean(axis=0)).astype(int).reshape(STEPS, probe.spec.layers)


def attention_masses(weights_SS: np.ndarray, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention float64 [N] that each visual row receives from text rows, and from visual rows.

    Args:
        weights_SS: one layer's attention, maximum over heads.
    """
    columns_SN = weights_SS[:, visual].astype(np.float64)
    return np.delete(columns_SN, visual, axis=0).sum(axis=0), columns_SN[visual].sum(axis=0)
