"""VisiPruner: text rows see no image in the shallow layers; one filter keeps the tokens whose values move the
last row; vision leaves where none of them does any more.

Published as decisions per input. Here the detector runs on the samples, and the layers and the budget are
fixed from what it finds (0-based layers, s shallow ones):

1. shallow layers: in layer 0 visual rows see no visual key, and what text rows give to visual keys goes to
   the value of the first (`merge`, released for the 7B model); in layers 1..s-1 text rows see no visual key;
2. filter layer of a sample: the first layer after s where leaving out some visual token turns the last row's
   attention output by a cosine below 0.995. A high quantile over the samples is taken: too early a filter
   loses what is not fused yet, too late a one only costs. It takes effect at the next layer's input;
3. budget: a quantile of how many tokens have an influence (norm) above the threshold in that layer. TopK and
   the threshold together keep exactly what the threshold keeps, wherever the budget holds it; how often it
   does not is measured (`overflow`);
4. exit of a sample: counted under the decisions made so far, the layer after the second one in which no token
   turns the output by a cosine below 0.999. A quantile over the samples is taken.

The published threshold, 0.2, is in the units of one model's values. By default it is calibrated: the value
for which the median sample keeps the published average of 10.3 of 576 tokens.

Where paper and code differ, the code is the default: the exit counts two layers in total (paper: two in a
row, `consecutive`), visual rows see each other in layers 1..s-1 (paper: not, `visual_attention`), the shallow
layers' visual keys stay in the cache for decode (paper: not, `shallow_cache`). The released 13B variant of
layer 0 (half of the visual keys hidden) cannot be expressed. Lost: filter and exit per input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import ValueInfluence
from trimvlm.value import Value
from trimvlm_calib.depth import check_share
from trimvlm_calib.influence import visual_influence
from trimvlm_calib.outcome import Curve, Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe
    from trimvlm_export.reference_record import Prefill

NAME = "visipruner"
SUMMARY = "vision-blind shallow layers, a filter by value influence, an exit (VisiPruner, section 5)"
SAMPLES = 100


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 6 of 32 layers are shallow; cosines 0.995 and 0.999; norm 0.2 for LLaVA-1.5-7B.

    Attributes:
        shallow: s, as a share of the depth, rounded to whole layers.
        merge: layer 0 gives text rows the first visual token's value for all visual weight; otherwise they
            see no visual key there either.
        mask: `post_softmax` zeroes weights after the softmax, as the code does; `additive` hides keys before.
        visual_attention: visual rows see each other in layers 1..s-1.
        shallow_cache: what the shallow layers keep of vision for decode.
        filter_cosine, exit_cosine: below these a token counts as moving the output.
        exit_layers: layers without such a token before the exit.
        consecutive: those layers must follow each other.
        threshold: least norm of a token that is kept; None: calibrated by `target`.
        target: share of the visual tokens that the median sample is to keep.
        filter_quantile, keep_quantile, exit_quantile: of the samples' filter layers, counts and exits.
    """

    shallow: float = 6 / 32
    merge: bool = True
    mask: Literal["post_softmax", "additive"] = "post_softmax"
    visual_attention: bool = True
    shallow_cache: Literal["live", "none"] = "live"
    filter_cosine: float = 0.995
    exit_cosine: float = 0.999
    exit_layers: int = 2
    consecutive: bool = False
    threshold: float | None = None
    target: float = 10.3 / 576
    filter_quantile: float = 0.9
    keep_quantile: float = 0.95
    exit_quantile: float = 0.9

    def __post_init__(self) -> None:
        check_share("shallow", self.shallow)
        check_share("target", self.target)
        if self.merge and self.mask == "additive":
            raise UserError("merge: moves weights after the softmax; give merge: false with mask: additive")
        if self.exit_layers < 1:
            raise UserError(f"exit_layers: {self.exit_layers} is less than 1")
        if self.threshold is not None and self.threshold < 0:
            raise UserError(f"threshold: {self.threshold} is negative; norms are not")
        for field in ("filter_quantile", "keep_quantile", "exit_quantile"):
            if not 0 <= getattr(self, field) <= 1:
                raise UserError(f"{field}: {getattr(self, field)} is not within 0 and 1")
        for field in ("filter_cosine", "exit_cosine"):
            if not -1 < getattr(self, field) <= 1:
                raise UserError(f"{field}: {getattr(self, field)} is not within -1 (excluded) and 1")


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Finds the filter layer, then threshold and budget there, then the exit.

    Raises:
        UserError: the model has no layer between the shallow ones and the last, or no sample has a filter.
    """
    depth, visual = probe.spec.layers, probe.spec.visual_tokens
    first = max(1, round(parameters.shallow * depth)) + 1  # the code's candidates start after layer s
    if first > depth - 2:
        raise UserError(
            f"shallow: with {first - 1} of {depth} layers shallow none is left to filter after; give less"
        )
    rules = shallow_rules(first - 1, parameters)
    blind = Decisions(layers=rules, mask=parameters.mask)
    found = _filter_layers(probe, blind, parameters, range(first, depth - 1))
    if not np.isfinite(found).any():
        raise UserError(
            f"filter_cosine: in no sample a visual token turns the output below {parameters.filter_cosine}; "
            "give a higher one"
        )
    filter_ = int(_quantile(np.minimum(found, depth - 2), parameters.filter_quantile))

    norms_BN = _norms(probe, blind, filter_)
    threshold = parameters.threshold
    if threshold is None:
        threshold = gap_after(norms_BN, max(1, round(parameters.target * visual)))
    counts = (norms_BN > threshold).sum(axis=1)
    keep = max(1, int(_quantile(counts, parameters.keep_quantile)))

    select = Select(layer=filter_ + 1, keep=keep, by=ValueInfluence(threshold=threshold))
    filtered = Decisions(layers=rules, mask=parameters.mask, select=(select,))
    exits = _exits(probe, filtered, parameters, filter_ + 1)
    exit_ = int(_quantile(exits, parameters.exit_quantile))
    cached = (LayerRule(layers=tuple(range(first - 1)), cache="none"),) * (parameters.shallow_cache == "none")
    return Outcome(
        decisions=Decisions(
            layers=(*rules, *cached),
            mask=parameters.mask,
            select=(select,),
            exit=exit_ if exit_ < depth else None,
        ),
        curves={
            "filter_samples": _histogram(found, depth),
            "exit_samples": _histogram(exits, depth),
            "tokens_above": _at(filter_, float(np.median(counts)), depth),
            "overflow": _at(filter_, round_figure(float((counts > keep).mean())), depth),
        },
    )


def shallow_rules(layers: int, parameters: Parameters) -> tuple[LayerRule, ...]:
    """Rules of layers 0..layers-1."""
    blind = tuple(range(1, layers))
    rules = [LayerRule(layers=(0,), text_keys="sink" if parameters.merge else "none", visual_keys="none")]
    if blind:
        keys = None if parameters.visual_attention else "none"
        rules.append(LayerRule(layers=blind, text_keys="none", visual_keys=keys))
    return tuple(rules)


def gap_after(norms_BN: np.ndarray, kept: int) -> float:
    """A threshold that the median sample exceeds `kept` times (of two median samples the lower).

    Halfway to the next norm, and not at one: there, rounding would decide what is kept.
    """
    falling = np.pad(-np.sort(-norms_BN, axis=1), ((0, 0), (0, 1)))  # below the last one there is zero
    halfway = (falling[:, kept - 1] + falling[:, kept]) / 2
    return round_figure(float(np.quantile(halfway, 0.5, method="lower")))


def exit_layer(moved: Mapping[int, bool], needed: int, consecutive: bool, depth: int) -> int:
    """The layer after the `needed`-th one in which no token moves the output; `depth` where there is none."""
    count = 0
    for layer, moves in sorted(moved.items()):
        count = count + 1 if not moves else 0 if consecutive else count
        if count == needed:
            return layer + 1
    return depth


def _filter_layers(
    probe: Probe, decisions: Decisions, parameters: Parameters, candidates: range
) -> np.ndarray:
    """Per sample, the first layer where some token moves the output; infinite where there is none."""

    def view(run: Prefill, inputs: Mapping[str, Any]) -> float:
        visual = probe.visual_rows(inputs)
        for layer in candidates:
            cosines, _ = visual_influence(run, layer, visual)
            if (cosines < parameters.filter_cosine).any():
                return float(layer)
        return -1.0

    found = probe.measure("filter layer", decisions, view, detail=True)[:, 0]
    return np.where(found < 0, np.inf, found)


def _norms(probe: Probe, decisions: Decisions, layer: int) -> np.ndarray:
    """Influence norms [B, N] in one layer."""

    def view(run: Prefill, inputs: Mapping[str, Any]) -> np.ndarray:
        return visual_influence(run, layer, probe.visual_rows(inputs))[1]

    return probe.measure("influence", decisions, view, detail=True)


def _exits(probe: Probe, decisions: Decisions, parameters: Parameters, first: int) -> np.ndarray:
    """Per sample, the exit layer; the depth where vision never leaves."""
    depth = probe.spec.layers

    def view(run: Prefill, inputs: Mapping[str, Any]) -> float:
        visual = probe.visual_rows(inputs)
        moved = {
            layer: bool((visual_influence(run, layer, visual)[0] < parameters.exit_cosine).any())
            for layer in range(first, depth)
        }
        return float(exit_layer(moved, parameters.exit_layers, parameters.consecutive, depth))

    return probe.measure("exit layer", decisions, view, detail=True)[:, 0]


def _quantile(values: np.ndarray, share: float) -> float:
    """The quantile, as one of the values: the higher neighbour."""
    return float(np.quantile(values, share, method="higher"))


def _histogram(layers: np.ndarray, depth: int) -> Curve:
    """Per layer, how many samples have theirs there; those that have none are in no layer."""
    return tuple(float((layers == layer).sum()) for layer in range(depth))


def _at(layer: int, value: float, depth: int) -> Curve:
    return tuple(value if each == layer else None for each in range(depth))
