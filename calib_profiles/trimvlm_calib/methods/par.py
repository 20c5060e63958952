"""PAR: a small router, trained on the frozen model, scores each prompt's visual tokens, and the later layers.

1. random actions on every sample: K of the candidate layers are left out, and tokens are kept by their rank
   in FastV's scores plus noise. Its divergence from the unpruned output puts an action into the better or the
   worse half (self-supervised: no answers are needed);
2. the router learns to find the better half likelier (`router_training`);
3. tokens are chosen per input by the router's scores, at the input of layer 2 as in FastV. Layers are fixed:
   the K that score lowest on average over the samples. With `variants` there are several such sets, one
   profile each, and the runtime takes for every input the one that the router holds likeliest. The first is
   the fixed set; each further one is, of the samples' own sets, the one that adds most to the mean likelihood
   of the best set at hand. Any set for any input, as published, would need a graph for each set.

The paper is not definite about the noise (on attention values or on ranks, 10 of what); here it is Gaussian
in ranks, and wide: with little noise only tokens near the cut ever differ between actions, and nothing is
learned of the others. The released code cannot train, and the visual rows of its router do not see the
question (`mask: causal`). Lost: layers per input beyond the variants.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal

import numpy as np

from trimvlm.errors import UserError
from trimvlm.profile import Decisions
from trimvlm.value import Value
from trimvlm_calib.depth import check_share
from trimvlm_calib.outcome import Curve, Outcome, TrainedRouter, round_figure

if TYPE_CHECKING:
    from trimvlm_calib.probe import Probe

NAME = "par"
SUMMARY = "a trained router ranks visual tokens per input, and later layers (Pruning All-Rounder, section 4)"
SAMPLES = 100  # the paper takes 5000


class Parameters(Value, frozen=True, kw_only=True):
    """Published: 144 of 576 tokens, 4 of the last 16 of 32 layers left out, 5 actions per sample, beta 1.

    Attributes:
        what: prune tokens, layers or both.
        keep: share of the visual tokens that stays, rounded to whole tokens.
        layer: the first layer with fewer tokens.
        skip: share of the layers that are left out, rounded to whole layers, at least one.
        candidates: share of the layers that may be left out: the last ones.
        variants: layer sets among which the runtime chooses.
        mask: whether the router's rows see the whole prompt or only what precedes them.
        width: of the router; None: the model's, at most 1024 (21 million parameters for a 7B model).
        actions: per sample.
        noise: standard deviation, as a share of the visual tokens.
        passes: over the samples in training; more of them learn the samples by heart.
        batch: samples per step.
        rate: AdamW's learning rate.
        beta: how sharply preferences are meant.
        seed: of actions, first weights and the order of the samples.
    """

    what: Literal["tokens", "layers", "joint"] = "joint"
    keep: float = 144 / 576
    layer: int = 2
    skip: float = 4 / 32
    candidates: float = 16 / 32
    variants: int = 1
    mask: Literal["full", "causal"] = "full"
    width: int | None = None
    actions: int = 8
    noise: float = 0.5
    passes: int = 4
    batch: int = 4
    rate: float = 1e-3
    beta: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("keep", "skip", "candidates"):
            check_share(field, getattr(self, field))
        for field, least in (("actions", 2), ("variants", 1), ("passes", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{field}: {getattr(self, field)} is less than {least}")
        if not (self.noise >= 0 and self.rate > 0 and self.beta > 0):
            raise UserError("noise, rate, beta: positive numbers (noise may be 0)")
        if self.variants > 1 and self.what == "tokens":
            raise UserError("variants: they differ in their layers, which what: tokens leaves alone")


def calibrate(probe: Probe, parameters: Parameters) -> Outcome:
    """Trains a router, and fixes the layers from its scores."""
    from trimvlm_calib.router_plan import RouterPlan
    from trimvlm_calib.router_training import preferences, train
    from trimvlm_export.router import Router, draw_parameters

    plan = RouterPlan(probe, parameters)
    figures_BK = probe.measure("actions", Decisions(), plan.view, detail=True)
    pairs = [
        preferences(plan.actions(inputs, row[: plan.tokens]), row[plan.tokens :])
        for inputs, row in zip(probe.inputs, figures_BK, strict=True)
    ]
    shape = plan.router_shape()
    spec = TrainedRouter(**shape, weights={}).named("router")
    router = Router(spec, probe.spec.hidden, probe.spec.layers)
    draw_parameters(router, parameters.seed)
    steps = max(1, parameters.passes * len(pairs) // parameters.batch)
    losses = train(
        router.to(probe.model.device),
        plan.router_inputs,
        pairs,
        steps=steps,
        batch=min(parameters.batch, len(pairs)),
        rate=parameters.rate,
        beta=parameters.beta,
        seed=parameters.seed,
        told=lambda step: probe.tell("training", step, steps),
    )
    scores_BR = plan.layer_scores(router)
    sets = layer_sets(scores_BR, plan.skip, parameters.variants) if plan.skip else [()]
    alternatives = tuple(plan.decisions([plan.first + number for number in each]) for each in sets)
    weights = {name: array.cpu().numpy() for name, array in router.state_dict().items()}
    needed = plan.keeps is not None or len(sets) > 1
    curves = {"router_loss": _thinned(losses, probe.spec.layers)}
    if plan.skip:
        means = tuple(round_figure(float(score)) for score in scores_BR.mean(axis=0))
        curves["layer_score"] = ((None,) * plan.first) + means
    return Outcome(
        decisions=alternatives[0],
        curves=curves,
        router=TrainedRouter(**shape, weights=weights) if needed else None,
        variants=alternatives if len(sets) > 1 else (),
    )


def layer_sets(scores_BR: np.ndarray, skip: int, count: int) -> list[tuple[int, ...]]:
    """Sets of layers to leave out, the one for averaged scores first.

    Args:
        scores_BR: of each sample and candidate layer.
        skip: layers in a set.
        count: sets.

    Raises:
        UserError: the samples do not ask for so many different sets.
    """

    def lowest(scores_R: np.ndarray) -> tuple[int, ...]:
        return tuple(sorted(np.argsort(scores_R, kind="stable")[:skip].tolist()))

    sets = [lowest(scores_BR.mean(axis=0))]
    left = sorted({lowest(row) for row in scores_BR} - set(sets))
    while len(sets) < count:
        if not left:
            raise UserError(
                f"variants: the samples ask for {len(sets)} different layer sets, not {count}; ask for fewer "
                "variants, or give more samples"
            )
        # Leaving out the set of lowest scores keeps the highest sum.
        lost = {each: scores_BR[:, each].sum(axis=1) for each in [*sets, *left]}
        sofar = np.min([lost[each] for each in sets], axis=0)
        best = min(left, key=lambda each: float(np.minimum(sofar, lost[each]).mean()))
        sets.append(best)
        left.remove(best)
    return sets


def _thinned(values: list[float], parts: int) -> Curve:
    """Means over `parts` stretches of equal length: a curve has one value per layer."""
    edges = np.linspace(0, len(values), parts + 1).round().astype(int)
    means = [values[a:b] for a, b in itertools.pairwise(edges.tolist())]
    return tuple(round_figure(float(np.mean(part))) if part else None for part in means)
