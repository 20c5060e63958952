"""HiDivDrop (HiDrop): visual tokens enter late, are filtered in a concave pyramid, and leave early.

Section 3: the injection layer is the first local minimum of the visual layer-to-layer similarity; filter
layers are extrema of ILVAS, the inter-layer visual attention similarity; the exit is where the curve of
deep-to-shallow masking leaves its plateau. The paper's curve is accuracy, which needs labels; here it is the
divergence of the prediction. A filter scores by its own layer's last-row attention. Position ids persist.

The published results are for weights fine-tuned under this very schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention
from trimvlm.value import Value
from trimvlm_calib.depth import layers_at
from trimvlm_calib.methods.vtw import exit_curve
from trimvlm_calib.outcome import Curve, Outcome, round_figure
from trimvlm_calib.pyramid import PUBLISHED, concave_pyramid

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe
    from trimvlm_export.reference_record import Prefill

NAME = "hidivdrop"
SUMMARY = "late injection, filter layers by ILVAS, early exit; for adapted weights (HiDivDrop, section 3)"
SAMPLES = 20


class Parameters(Value, frozen=True, kw_only=True):
    """Published for 32 layers and 576 tokens: inject 8, filters 10 14 16 18, keep 215 10 5 1, exit 24.

    Attributes:
        keep: what each filter keeps, in layer order, as shares of the visual tokens (at least one token), or
            a published schedule: `tok64`, `tok48`, `tok80`. A model with fewer extrema than budgets uses the
            first budgets; one with more uses the strongest extrema.
        mean: live visual tokens, mean over all layers, as a share of the visual tokens (64 of 576): budgets
            of a concave pyramid are found for it and take the place of `keep`, which gives their number.
        layers: `measured`, or `published`: injection, filters and exit of the published schedule that `keep`
            names, as shares of the depth; nothing is measured.
        window: n of ILVAS(l, l + n), as a share of the depth (4 of 32).
        top: K of ILVAS, as a share of the visual tokens (50 of 576; the paper tries 5 to 200).
        extrema: the text of the paper says maxima, a caption says valleys (`minima`).
        eta: largest divergence in nats on the plateau that ends at the exit.
    """

    keep: tuple[float, ...] | Literal["tok48", "tok64", "tok80"] = "tok64"
    mean: float | None = None
    layers: Literal["measured", "published"] = "measured"
    window: float = 4 / 32
    top: float = 50 / 576
    extrema: Literal["maxima", "minima"] = "maxima"
    eta: float = 0.003

    def __post_init__(self) -> None:
        if self.layers == "published" and not isinstance(self.keep, str):
            raise UserError("layers: published layers go with a published schedule, as in keep=tok64")
        shares = self.shares
        if not shares or list(shares) != sorted(shares, reverse=True):
            raise UserError(f"keep: {list(shares)} is not a falling list of shares")
        for field, values in (("keep", shares), ("window", [self.window]), ("top", [self.top])):
            if not all(0 < share <= 1 for share in values):
                raise UserError(f"{field}: {getattr(self, field)}: shares are within 0 (excluded) and 1")
        if self.mean is not None and not 0 < self.mean <= 1:
            raise UserError(f"mean: {self.mean} is not within 0 (excluded) and 1")
        if self.eta <= 0:
            raise UserError(f"eta: {self.eta} is not positive")

    @property
    def shares(self) -> tuple[float, ...]:
        """`keep` as shares of the visual tokens."""
        if not isinstance(self.keep, str):
            return self.keep
        known = PUBLISHED[self.keep]
        return tuple(keep / known.tokens for keep in known.keep)


def at_share(share: float) -> Parameters:
    """Keeps `share` of the tokens in the mean over all layers."""
    return Parameters(mean=share)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Decides where visual tokens enter, are filtered and leave, and how many each filter keeps.

    Raises:
        UserError: the curves have no minimum, exit or extremum to decide by, or no pyramid has `mean`.
    """
    if parameters.layers == "published":
        inject, exit_, filters, curves = *_published(probe.spec.layers, parameters), {}
    else:
        inject, exit_, filters, curves = _measured(probe, parameters)
    selects = tuple(
        Select(layer=layer, keep=keep, by=LastRowAttention(attention="own"))
        for layer, keep in zip(filters, _budgets(probe, parameters, inject, exit_, filters), strict=True)
    )
    return Outcome(
        decisions=Decisions(inject=inject, exit=exit_, select=selects),
        curves=curves,
        needs_adapted_weights=True,
    )


def _published(depth: int, parameters: Parameters) -> tuple[int, int, list[int]]:
    """Injection, exit and filters of a published schedule, scaled to `depth` layers."""
    assert isinstance(parameters.keep, str)
    known = PUBLISHED[parameters.keep]
    marks = (known.inject, *known.filters, known.exit)
    inject, *filters, exit_ = layers_at("layers", [mark / known.layers for mark in marks], depth)
    return inject, exit_, filters


def _measured(probe: Probe, parameters: Parameters) -> tuple[int, int, list[int], dict[str, Curve]]:
    """The same from similarity, divergence at exit, and ILVAS, in this order, each on the ones before it."""
    similarity = probe.visual_similarity()
    inject = first_minimum(similarity)
    exit_kl = exit_curve(probe, inject + 1)
    exit_ = plateau(exit_kl, parameters.eta)
    ilvas = _ilvas(probe, Decisions(inject=inject, exit=exit_), parameters)
    filters = extrema(ilvas, parameters.extrema, inject + 1, len(parameters.shares))
    if not filters:
        raise UserError(
            f"window: between injection (layer {inject}) and exit (layer {exit_}) ILVAS has no layer to "
            "compare; give a smaller window or a smaller eta"
        )
    return inject, exit_, filters, {"visual_similarity": similarity, "kl_exit": exit_kl, "ilvas": ilvas}


def _budgets(probe: Probe, parameters: Parameters, inject: int, exit_: int, filters: list[int]) -> list[int]:
    """What each filter keeps."""
    visual = probe.spec.visual_tokens
    if parameters.mean is None:
        return [max(1, round(share * visual)) for share in parameters.shares[: len(filters)]]
    return concave_pyramid(
        parameters.mean * visual,
        tokens=visual,
        layers=probe.spec.layers,
        inject=inject,
        exit_=exit_,
        filters=filters,
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


def plateau(curve: Curve, eta: float) -> int:
    """The lowest layer from which on every value is at most `eta`, searched from deep to shallow.

    Raises:
        UserError: there is none; the message gives the last value.
    """
    measured = [(layer, value) for layer, value in enumerate(curve) if value is not None]
    found = None
    for layer, value in reversed(measured):
        if value > eta:
            break
        found = layer
    if found is None:
        layer, value = measured[-1]
        raise UserError(
            f"eta: there is no plateau within {eta} nats: at layer {layer} the divergence is {value}; give a "
            "larger eta"
        )
    return found


def _ilvas(probe: Probe, decisions: Decisions, parameters: Parameters) -> Curve:
    """ILVAS(l, l + n, K), mean over samples, for layers where both l and l + n hold visual rows.

    The mean over the K most attended visual tokens of layer l of the cosine between their per-head attention
    in the two layers (section 3.3). A token that no head attends to counts as 0.
    """
    depth, exit_ = probe.spec.layers, decisions.exit or probe.spec.layers
    window = max(1, round(parameters.window * depth))
    top = max(1, round(parameters.top * probe.spec.visual_tokens))
    layers = range(decisions.inject, exit_ - window)

    def view(run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
        attention_LHN = np.stack(run.last_row)[:, :, probe.visual_rows(inputs)]
        means = []
        for layer in layers:
            order = np.argsort(-attention_LHN[layer].mean(axis=0), kind="stable")[:top]
            now, later = (attention_LHN[at][:, order].astype(np.float64) for at in (layer, layer + window))
            norms = np.linalg.norm(now, axis=0) * np.linalg.norm(later, axis=0)
            cosines = (now * later).sum(axis=0) / np.maximum(norms, np.finfo(np.float64).tiny)
            means.append(float(cosines.mean()))
        return means

    if not layers:
        return (None,) * depth
    mean = dict(zip(layers, probe.measure("ILVAS", decisions, view).mean(axis=0), strict=True))
    return tuple(round_figure(float(mean[layer])) if layer in mean else None for layer in range(depth))
