"""ASL-Skip, the decoder side of SPIDER: visual rows bypass the attention or the FFN of a layer, whichever
contributes less. (The encoder side is `msv-prune`; `msv-prune+asl-skip` is SPIDER.)

SLC of a sub-layer is KL(full || visual rows bypass it) at the last prompt row, mean over the samples. The
paper states neither direction nor position; this is the first generated token's distribution. VSkip-Attn
leaves visual rows as keys and values only: the paper's text and its table 3 say so, its FLOPs do not.

Two static forms of the per-token decision:

* `staged`: tokens enter skip mode at a few layers, in fixed numbers, the highest accumulators first.
  The numbers come from the published rule, run on the samples: S_skip += w1 ReLU(1 - R) + w2 SLC^Norm over
  the first half of the layers, and a token skips from the layer on where S_skip reaches the threshold. Lost:
  at which layer each token enters.
* `offline`: the layers of lowest SLC bypass their target for all visual tokens (the ablation without S_sa).

Where the paper contradicts itself or is silent:

* tokens in skip mode bypass targets to the last layer (its section 4.3; its algorithm runs the second half in
  full, which would save nothing);
* the target is the sub-layer with the lower raw SLC (section 3.2, and table 9 fits it); equation 5 compares
  SLC normalised per module: `target: normalised`;
* only the ratio w1/w2 = 3 is given, with a threshold of 20. Weights that sum to one reach 16 at most, so
  w1 = 3 and w2 = 1. The threshold is for 32 layers and is scaled with the depth;
* both terms of R are scaled to 0..1 by their least and greatest value over the visual rows of a layer;
  entropy reads the row as it is, without the final norm.

R is measured in the dense model: what skipping changes in later layers is not simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, SkipMode, SkipStage
from trimvlm.value import Value
from trimvlm_calib.depth import check_share, check_shares, layers_at
from trimvlm_calib.outcome import Curve, Outcome, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe
    from trimvlm_export.reference_record import Prefill

NAME = "asl-skip"
SUMMARY = "visual rows in skip mode bypass each layer's less contributing sub-layer (SPIDER, section 4.2)"
SAMPLES = 150


class Parameters(Value, frozen=True, kw_only=True):
    """Published: w1/w2 = 3, threshold 20, first half of the layers.

    Attributes:
        form: `staged` or `offline`, see above.
        target: how a layer's sub-layer is chosen.
        share: `offline`: share of the layers whose target is bypassed; not published, V-Skip's here.
        stages: `staged`: layers at which tokens may enter skip mode, as shares of the depth.
        skipped: shares of the visual tokens in skip mode from each stage on (the paper's R_s), instead of
            counts from the threshold.
        weights: w1 of the token's score and w2 of the layer's.
        threshold: T_skip at 32 layers.
        quantile: of the samples' counts, that a stage takes.
        entropy, correlation: the two terms of R. Entropy costs an LM head over all visual rows at each stage.
    """

    form: Literal["staged", "offline"] = "staged"
    target: Literal["raw", "normalised"] = "raw"
    share: float = 19 / 32
    stages: tuple[float, ...] = (8 / 32, 12 / 32, 16 / 32)
    skipped: tuple[float, ...] | None = None
    weights: tuple[float, float] = (3.0, 1.0)
    threshold: float = 20.0
    quantile: float = 0.5
    entropy: bool = True
    correlation: bool = True

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_shares("stages", self.stages, "rising")
        if self.skipped is not None:
            check_shares("skipped", self.skipped, "rising")
            if len(self.skipped) != len(self.stages):
                raise UserError(f"skipped: {len(self.skipped)} shares for {len(self.stages)} stages")
        if self.threshold <= 0:
            raise UserError(f"threshold: {self.threshold} is not positive")
        if min(self.weights) < 0:
            raise UserError(f"weights: {list(self.weights)}: none may be negative")
        if not 0 <= self.quantile <= 1:
            raise UserError(f"quantile: {self.quantile} is not within 0 and 1")
        if not (self.entropy or self.correlation):
            raise UserError("entropy, correlation: both are off, nothing ranks the tokens")


def at_share(share: float) -> Parameters:
    """Leaves `share` of the tokens out of skip mode, from the first stage on."""
    return Parameters(skipped=(max(1 - share, 1e-6),) * 3)


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Measures SLC, chooses targets, then layers or stages.

    Raises:
        UserError: the model is too shallow for the stages, or no token reaches the threshold.
    """
    slc = {kind: _contribution(probe, kind) for kind in ("attention", "ffn")}
    targets = choose_targets(slc, parameters.target)
    curves = {f"slc_{kind}": curve for kind, curve in slc.items()}
    if parameters.form == "offline":
        least = np.array([slc[kind][layer] for layer, kind in enumerate(targets)], np.float64)
        count = max(1, round(parameters.share * probe.spec.layers))
        chosen = sorted(int(layer) for layer in np.argsort(least, kind="stable")[:count])
        return Outcome(decisions=Decisions(layers=bypass(targets, chosen, "none")), curves=curves)

    layers = layers_at("stages", parameters.stages, probe.spec.layers)
    visual = probe.spec.visual_tokens
    if parameters.skipped is not None:
        counts = dict(zip(layers, (max(1, round(s * visual)) for s in parameters.skipped), strict=True))
    else:
        skipping = _skipping(probe, parameters, targets, slc)
        curves["tokens_skipping"] = skipping
        counts = {layer: int(count) for layer in layers if (count := skipping[layer])}
    stages: list[SkipStage] = []
    for layer, count in counts.items():  # a stage that nobody enters would only cost its scores
        if not stages or count > stages[-1].count:
            stages.append(SkipStage(layer=layer, count=count))
    skip = SkipMode(stages=tuple(stages), entropy=parameters.entropy, correlation=parameters.correlation)
    rules = bypass(targets, range(stages[0].layer, probe.spec.layers), "unskipped")
    return Outcome(decisions=Decisions(skip=skip, layers=rules), curves=curves, counted_of=visual)


def choose_targets(slc: Mapping[str, Curve], how: str) -> list[str]:
    """Per layer, the sub-layer to bypass: `attention` or `ffn`, ties to attention."""
    if how == "raw":
        attention, ffn = (np.array(slc[kind], np.float64) for kind in ("attention", "ffn"))
    else:
        attention, ffn = (-normalised(slc[kind]) for kind in ("attention", "ffn"))
    return ["attention" if a <= f else "ffn" for a, f in zip(attention, ffn, strict=True)]


def normalised(curve: Curve) -> np.ndarray:
    """SLC^Norm (equation 5): 1 for the least contributing layer of a module, 0 for the most."""
    values = np.array(curve, np.float64)
    return 1 - (values - values.min()) / (np.ptp(values) + np.finfo(np.float64).tiny)


def bypass(targets: list[str], layers: Any, rows: Literal["none", "unskipped"]) -> tuple[LayerRule, ...]:
    """Rules under which `layers` bypass their targets for all visual rows, or for those in skip mode."""
    attention = tuple(layer for layer in layers if targets[layer] == "attention")
    ffn = tuple(layer for layer in layers if targets[layer] == "ffn")
    rules = (LayerRule(layers=attention, query=rows), LayerRule(layers=ffn, ffn=rows))
    return tuple(rule for rule in rules if rule.layers)


def token_scores(
    hidden_SD: np.ndarray, visual: np.ndarray, unembed: Any, *, entropy: bool, correlation: bool
) -> np.ndarray:
    """S_sa float64 [N] of equation 4 for the input of one layer.

    Args:
        visual: rows of the prompt that hold visual tokens; all others are text.
        unembed: weight of the LM head, a tensor [V, D].
    """
    import torch

    rows_ND = hidden_SD[visual]
    retention = np.zeros(len(visual))
    if entropy:
        states = torch.from_numpy(rows_ND).to(unembed.device, unembed.dtype)
        log_p_NV = (states @ unembed.T).float().log_softmax(dim=-1)
        entropy_N = -(log_p_NV.exp() * log_p_NV).sum(dim=-1)
        retention += _scaled(entropy_N.double().cpu().numpy())
    if correlation:
        rows = rows_ND.astype(np.float64)
        text = np.delete(hidden_SD, visual, axis=0).mean(axis=0, dtype=np.float64)
        retention += _scaled(rows @ text / (np.linalg.norm(rows, axis=1) * np.linalg.norm(text)))
    return np.maximum(0.0, 1 - retention)


def _contribution(probe: Probe, kind: str) -> Curve:
    """SLC of one kind of sub-layer."""
    layers = range(probe.spec.layers)
    targets = [kind for _ in layers]
    candidates = {layer: Decisions(layers=bypass(targets, [layer], "none")) for layer in layers}
    return probe.sweep(f"SLC of {kind}", candidates, "full||pruned")


def _skipping(probe: Probe, parameters: Parameters, targets: list[str], slc: Mapping[str, Curve]) -> Curve:
    """Per layer, how many tokens the published rule has in skip mode: a quantile over the samples.

    Raises:
        UserError: at no stage there is any; the message gives the highest accumulator.
    """
    depth = probe.spec.layers
    threshold = parameters.threshold * depth / 32
    norms = {kind: normalised(curve) for kind, curve in slc.items()}
    token, layer_ = parameters.weights
    unembed = probe.model.get_output_embeddings().weight.detach()

    def view(run: Prefill, inputs: Mapping[str, Any]) -> list[float]:
        visual, counts = probe.visual_rows(inputs), []
        accumulator = np.zeros(len(visual))
        for layer in range(max(1, depth // 2)):
            scores = token_scores(
                run.hidden[layer],
                visual,
                unembed,
                entropy=parameters.entropy,
                correlation=parameters.correlation,
            )
            accumulator += token * scores + layer_ * norms[targets[layer]][layer]
            counts.append(int((accumulator >= threshold).sum()))
        return [*counts, float(accumulator.max())]

    figures_BK = probe.measure("tokens in skip mode", Decisions(), view, detail=True)
    half = np.quantile(figures_BK[:, :-1], parameters.quantile, axis=0, method="lower")
    curve = tuple(float(value) for value in np.append(half, [half[-1]] * (depth - len(half))))
    highest = round_figure(float(figures_BK[:, -1].max()))
    if not any(curve[layer] for layer in layers_at("stages", parameters.stages, depth)):
        raise UserError(
            f"threshold: at no stage enough tokens reach {round_figure(threshold)} "
            f"({parameters.threshold} at 32 layers); the highest accumulator is {highest}: "
            "give a lower threshold, a higher quantile, or skipped"
        )
    return curve


def _scaled(values_N: np.ndarray) -> np.ndarray:
    """Scaled to 0..1 by the least and the greatest; zero where all are equal."""
    spread = np.ptp(values_N)
    return (values_N - values_N.min()) / spread if spread else np.zeros_like(values_N)
