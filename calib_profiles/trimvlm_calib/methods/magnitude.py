"""Magnitude: the sub-layers with the smallest weights are dropped, for all rows.

The baseline that SPIDER compares its contribution scores with (its figure of KL divergence per layer). The
papers do not say which norm. An attention block and an FFN differ in size, so a plain sum of squares would
decide by size: the default is the root mean square over a sub-layer's matrices, `l2` the plain norm.

What decides are the weights alone. The divergence of each dropped sub-layer is measured all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule
from trimvlm.value import Value
from trimvlm_calib.depth import check_share
from trimvlm_calib.methods.v_skip import MINIMUM
from trimvlm_calib.outcome import Curve, Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "magnitude"
SUMMARY = "sub-layers with the smallest weights are dropped for all rows (baseline)"
SAMPLES = 20

# What is left of a layer without the sub-layer.
WITHOUT: dict[str, Literal["ffn", "attention"]] = {"attention": "ffn", "ffn": "attention"}


class Parameters(Value, frozen=True, kw_only=True):
    """No published setting.

    Attributes:
        share: share of all sub-layers (two a layer) to drop, rounded, at least one.
        norm: `rms` divides by the number of weights, `l2` does not.
    """

    share: float = 4 / 32
    norm: Literal["rms", "l2"] = "rms"

    def __post_init__(self) -> None:
        check_share("share", self.share)


def at_share(share: float) -> Parameters:
    """Keeps `share` of them."""
    return Parameters(share=max(1 - share, MINIMUM))


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Drops the sub-layers of smallest norm; of equal ones the lower layer, attention before FFN.

    Raises:
        UserError: nothing of the model would be left.
    """
    depth = probe.spec.layers
    norms = weight_norms(probe, parameters.norm)
    count = max(1, round(parameters.share * 2 * depth))
    if count >= 2 * depth:
        raise UserError(f"share: all {2 * depth} sub-layers would be dropped; give a smaller share")
    ranked = sorted(
        (norms[kind][layer], layer, kind) for kind in ("attention", "ffn") for layer in range(depth)
    )
    dropped = {kind: sorted(layer for _, layer, k in ranked[:count] if k == kind) for kind in WITHOUT}
    curves: dict[str, Curve] = {f"norm_{kind}": curve for kind, curve in norms.items()}
    for kind, layers in dropped.items():
        candidates = {layer: Decisions(layers=_rules({kind: [layer]})) for layer in layers}
        if candidates:
            curves[f"kl_{kind}"] = probe.sweep(f"{kind} dropped", candidates, "full||pruned")
    return Outcome(decisions=Decisions(layers=_rules(dropped)), curves=curves)


def weight_norms(probe: Probe, norm: str) -> dict[str, tuple[float, ...]]:
    """Per sub-layer and layer, the norm of all its weight matrices together, in float64."""
    layers: Any = probe.model.model.language_model.layers
    norms: dict[str, list[float]] = {"attention": [], "ffn": []}
    for layer in layers:
        for kind, module in (("attention", layer.self_attn), ("ffn", layer.mlp)):
            matrices = [weight.detach().double() for weight in module.parameters() if weight.ndim == 2]
            squares = sum(float((weight**2).sum()) for weight in matrices)
            size = sum(weight.numel() for weight in matrices) if norm == "rms" else 1
            norms[kind].append(round_figure((squares / size) ** 0.5))
    return {kind: tuple(values) for kind, values in norms.items()}


def _rules(dropped: dict[str, list[int]]) -> tuple[LayerRule, ...]:
    """A layer that loses both sub-layers is not executed at all."""
    whole = sorted(set(dropped.get("attention", ())) & set(dropped.get("ffn", ())))
    rules = [
        LayerRule(layers=tuple(layer for layer in layers if layer not in whole), sublayers=WITHOUT[kind])
        for kind, layers in dropped.items()
        if set(layers) - set(whole)
    ]
    return (*rules, LayerRule(layers=tuple(whole), execute="none")) if whole else tuple(rules)
