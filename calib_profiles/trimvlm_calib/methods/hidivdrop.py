"""HiDivDrop (HiDrop): visual tokens enter late, are filtered in a concave pyramid, and leave early.

Section 3: the injection layer is the first local minimum of the visual layer-to-layer similarity; filter
layers are extrema of ILVAS, the inter-layer visual attention similarity; the exit is where later layers need
no visual tokens. The paper reads the exit off an accuracy plateau, which needs labels; here it is VTW's KL
criterion. A filter scores by its own layer's last-row attention. Position ids persist.

The published results are for weights fine-tuned under this very schedule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention
from trimvlm.value import Value
from trimvlm_calib.methods.vtw import exit_curve, first_within
from trimvlm_calib.outcome import Curve, Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "hidivdrop"
SUMMARY = "late injection, filter layers by ILVAS, early exit; for adapted weights (HiDivDrop, section 3)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published for 32 layers and 576 tokens: inject 8, filters 10 14 16 18, keep 215 10 5 1, exit 24.

    Attributes:
        keep: share of the visual tokens that each filter keeps, in layer order (at least one token). A model
            with fewer extrema than budgets uses the first budgets; one with more uses the strongest extrema.
        window: n of ILVAS(l, l + n), as a share of the depth (4 of 32).
        top: K of ILVAS, as a share of the visual tokens (50 of 576; the paper tries 5 to 200).
        extrema: the text of the paper says maxima, a caption says valleys.
        eta: largest divergence in nats at the exit, as for vtw.
    """

    keep: tuple[float, ...] = (215 / 576, 10 / 576, 5 / 576, 1 / 576)
    window: float = 4 / 32
    top: float = 50 / 576
    extrema: Literal["maxima", "minima"] = "maxima"
    eta: float = 0.003

    def __post_init__(self) -> None:
        if not self.keep or list(self.keep) != sorted(self.keep, reverse=True):
            raise UserError(f"keep: {list(self.keep)} is not a falling list of shares")
        for field, shares in (("keep", self.keep), ("window", [self.window]), ("top", [self.top])):
            if not all(0 < share <= 1 for share in shares):
                raise UserError(f"{field}: {getattr(self, field)}: shares are within 0 (excluded) and 1")
        if self.eta <= 0:
            raise UserError(f"eta: {self.eta} is not positive")


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Measures similarity, divergence at exit, and ILVAS, in this order, each on the decisions before it.

    Raises:
        UserError: the curves have no minimum, no exit or no extremum to decide by.
    """
    similarity = probe.visual_similarity()
    inject = first_minimum(similarity)
    exit_kl = exit_curve(probe, inject + 1)
    exit_ = first_within(exit_kl, parameters.eta)
    ilvas = _ilvas(probe, Decisions(inject=inject, exit=exit_), parameters)
    filters = extrema(ilvas, parameters.extrema, inject + 1, len(parameters.keep))
    if not filters:
        raise UserError(
            f"window: between injection (layer {inject}) and exit (layer {exit_}) ILVAS has no layer to "
            "compare; give a smaller window or a smaller eta"
        )
    visual = probe.spec.visual_tokens
    selects = tuple(
        Select(layer=layer, keep=max(1, round(share * visual)), by=LastRowAttention(attention="own"))
        for layer, share in zip(filters, parameters.keep, strict=False)
    )
    return Outcome(
        decisions=Decisions(inject=inject, exit=exit_, select=selects),
        curves={"visual_similarity": similarity, "kl_exit": exit_kl, "ilvas": ilvas},
        needs_adapted_weights=True,
    )


def first_minimum(curve: Curve) -> int:
    """First layer whose value lies below both neighbours'.

    Raises:
        UserError: there is none.
    """
    for layer in range(1, len(curve) - 1):
        before, value, after = curve[layer - 1 : layer + 2]
        assert before is not None and value is not None and after is not None
        if before > value <= after:
            return layer
    raise UserError(
        "the visual similarity has no local minimum, so there is no layer to inject at: this model's visual "
        "rows change as HiDivDrop does not expect; use another method"
    )


def extrema(curve: Curve, kind: str, first: int, count: int) -> list[int]:
    """Local extrema among the layers from `first` on that have a value: the `count` strongest, ascending.

    The two ends of the curve count where they exceed their one neighbour.
    """
    sign = 1.0 if kind == "maxima" else -1.0
    value = {layer: sign * each for layer, each in enumerate(curve) if each is not None and layer >= first}
    peaks = [
        layer
        for layer in value
        if value[layer] > value.get(layer - 1, -np.inf) and value[layer] >= value.get(layer + 1, -np.inf)
    ]
    return sorted(sorted(peaks, key=lambda layer: -value[layer])[:count])


def _ilvas(probe: Probe, decisions: Decisions, parameters: Parameters) -> Curve:
    """ILVAS(l, l + n, K), mean over samples, for layers where both l and l + n hold visual rows.

    The mean over the K most attended visual tokens of layer l of the cosine between their per-head attention
    in the two layers (section 3.3).
    """
    layers, exit_ = probe.spec.layers, decisions.exit or probe.spec.layers
    window = max(1, round(parameters.window * layers))
    top = max(1, round(parameters.top * probe.spec.visual_tokens))
    sums = dict.fromkeys(range(decisions.inject, exit_ - window), 0.0)
    samples = 0
    for attention_LHN in probe.visual_attention(decisions):
        samples += 1
        for layer in sums:
            order = np.argsort(-attention_LHN[layer].mean(axis=0), kind="stable")[:top]
            now, later = (attention_LHN[at][:, order].astype(np.float64) for at in (layer, layer + window))
            norms = np.linalg.norm(now, axis=0) * np.linalg.norm(later, axis=0)
            cosines = (now * later).sum(axis=0) / np.maximum(norms, np.finfo(np.float64).tiny)
            sums[layer] += cosines.mean()  # a token that no head attends to counts as 0
    return tuple(round_figure(sums[layer] / samples) if layer in sums else None for layer in range(layers))
