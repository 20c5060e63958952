"""Comparing one answer computed twice. Shapes: V vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trimvlm.parity import Metric
from trimvlm_tools.parity.answer import Answer
from trimvlm_tools.parity.choices import choices


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Gates for a precision of the graph against the float32 reference on the same (rounded) weights.

    Attributes:
        visual, logits: largest differences; of the largest value (`max_share`) where `relative`, for in half
            precision a value is off by a share of itself.
        kv: a share, always.
        score_margin: choices whose scores are within it of another one are ties.
        skip_margin: the same for skip mode, whose accumulators are sums.
        tower_noise: patches that such a share of noise changes are ties (`hangs_on_rounding`).
    """

    visual: float
    logits: float
    kv: float
    score_margin: float
    skip_margin: float
    tower_noise: float
    relative: bool = True

    def margin(self, choice: str) -> float:
        """Of a choice, by its name (see `choices.py`)."""
        return self.skip_margin if choice.startswith("skipped") else self.score_margin


# Half precision: three to four times the worst that docs/parity.md measures; margins twice, for two scores.
LIMITS = {
    "float32": Limits(
        visual=1e-4,
        logits=1e-4,
        kv=1e-4,
        score_margin=1e-6,
        skip_margin=1e-6,
        tower_noise=1e-5,
        relative=False,
    ),
    "float16": Limits(
        visual=5e-3, logits=1e-2, kv=2e-2, score_margin=1e-3, skip_margin=2.5e-2, tower_noise=2**-11
    ),
    "int8 activations": Limits(
        visual=5e-2, logits=8e-2, kv=2e-1, score_margin=8e-3, skip_margin=1.5e-1, tower_noise=2**-7
    ),
    "bfloat16": Limits(
        visual=4e-2, logits=8e-2, kv=1e-1, score_margin=8e-3, skip_margin=1.5e-1, tower_noise=2**-8
    ),
}

OF_LARGEST = ", of the largest"
VISUAL, LOGITS, KV = "vision features max abs", "logits max abs", f"KV max abs{OF_LARGEST}"
UNGATED = (VISUAL, LOGITS, "logits KL (nats)", "scores max abs", "smallest score gap at a cut")

# Choices that are compared, by the first part of their names.
CHOICES = {
    "patches": "answers with other patches",
    "selected": "answers with other selections",
    "present_visible": "answers with other rows below a threshold",
    "skipped": "answers with other rows in skip mode",
}


@dataclass
class Worst:
    """Keeps the worst of each metric over many answers.

    Attributes:
        thresholds: of the selections that have one, by their number.
        same: the worst over those answers whose choices are those of the rung before.
        unexplained: answers of which the first other choice is no tie.
    """

    limits: Limits
    thresholds: Mapping[int, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    same: dict[str, float] = field(default_factory=dict)
    unexplained: int = 0

    def add(self, ours: Answer, theirs: Answer) -> None:
        """Compares `ours` with the rung before, `theirs`."""
        values = dict(self._choices(ours, theirs))
        others = sum(values.get(name, 0.0) for name in CHOICES.values())
        if ours.visual is not theirs.visual:  # else they were given, not computed
            values |= self._differences(VISUAL, ours.visual, theirs.visual)
        steps = min(len(ours.logits), len(theirs.logits))
        values |= self._differences(LOGITS, ours.logits[:steps], theirs.logits[:steps])
        values["logits KL (nats)"] = kl(theirs.logits[:steps], ours.logits[:steps])
        for mine, reference in zip(ours.kv, theirs.kv, strict=True):
            worst = max(max_share(a, b) for a, b in zip(mine, reference, strict=True))
            values[KV] = max(values.get(KV, 0.0), worst)
        values["answers with other tokens"] = float(ours.tokens != theirs.tokens)
        self._keep(self.values, values)
        if not others:
            self._keep(self.same, values)

    def metrics(self, prefix: str = "") -> tuple[Metric, ...]:
        """All metrics, with their gates."""
        kind = OF_LARGEST if self.limits.relative else ""
        limits = {
            VISUAL + kind: self.limits.visual,
            **dict.fromkeys(CHOICES.values(), 0.0),
            LOGITS + kind: self.limits.logits,
            KV: self.limits.kv,
            "answers with other tokens": 0.0,
        }
        # A choice that differs inside the margin makes everything after it differ: ambiguous, not wrong.
        tie = any(self.values.get(name, 0.0) for name in CHOICES.values()) and not self.unexplained
        return tuple(
            Metric(
                name=prefix + name,
                value=self.values.get(name),
                limit=limits.get(name),
                ambiguous=tie
                and (not name.startswith(VISUAL) or self.values.get(CHOICES["patches"], 0.0) > 0)
                and self.same.get(name, 0.0) <= limits.get(name, np.inf),
                note="differs only where scores tie" if tie and name in CHOICES.values() else "",
            )
            for name in dict.fromkeys([*limits, *UNGATED])
            if name in self.values
        )

    def _differences(self, name: str, ours: NDArray, theirs: NDArray) -> dict[str, float]:
        share = {name + OF_LARGEST: max_share(ours, theirs)} if self.limits.relative else {}
        return {name: max_abs(ours, theirs), **share}

    def _choices(self, ours: Answer, theirs: Answer) -> Iterator[tuple[str, float]]:
        """Metrics of the choices; only the first other one of an answer counts as tied or not."""
        reference, mine = choices(theirs, self.thresholds), choices(ours, self.thresholds)
        differ = {
            name: name not in mine or mine[name].rows != choice.rows for name, choice in reference.items()
        }
        first = next((name for name, other in differ.items() if other), None)
        if first is not None:
            self.unexplained += reference[first].gap > self.limits.margin(first)
        if first is None:
            pairs = zip([*ours.scores, *ours.skip_scores], [*theirs.scores, *theirs.skip_scores], strict=True)
            yield "scores max abs", max((max_abs(a, b) for a, b in pairs), default=0.0)
        gaps = [choice.gap for choice in reference.values() if np.isfinite(choice.gap)]
        if gaps:
            yield "smallest score gap at a cut", min(gaps)
        for kind, metric in CHOICES.items():
            found = [other for name, other in differ.items() if name.partition(".")[0] == kind]
            if found or kind == "selected":
                yield metric, float(any(found))

    @staticmethod
    def _keep(worst: dict[str, float], values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if name.startswith("answers"):
                worst[name] = worst.get(name, 0.0) + value
            elif name.startswith("smallest"):
                worst[name] = min(worst.get(name, np.inf), value)
            else:
                worst[name] = max(worst.get(name, 0.0), value)


def max_abs(a: NDArray, b: NDArray) -> float:
    """Largest absolute difference; infinite where a value is not a number or shapes differ."""
    if a.shape != b.shape:
        return np.inf
    if a.size == 0:
        return 0.0
    worst = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return worst if np.isfinite(worst) else np.inf


def max_share(a: NDArray, b: NDArray) -> float:
    """Largest absolute difference, as a share of the largest value of `b` where that is above 1. A pruned
    model may carry values of ten and more, which float32 cannot place within 1e-5."""
    return max_abs(a, b) / max(1.0, float(np.abs(b.astype(np.float64)).max(initial=0.0)))


def kl(p_logits: NDArray, q_logits: NDArray) -> float:
    """Largest KL(p || q) over the rows of two [steps, V] arrays of logits, in nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())


def log_softmax(logits: NDArray) -> NDArray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
