"""Comparing one answer computed twice. Shapes: V vocabulary, G key/value heads, P rows, C head size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trimvlm.parity import Metric


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one implementation computed for one question.

    Attributes:
        visual: projector outputs [N, D].
        selected: per stage the surviving visual rows, ascending.
        scores: per stage the score of each row that entered.
        logits: float32 [steps, V]: last prompt row, then after each teacher-forced token.
        kv: per executed layer, keys and values [1, G, P, C] after the prefill.
        tokens: greedy ids.
    """

    visual: NDArray
    selected: list[NDArray]
    scores: list[NDArray]
    logits: NDArray
    kv: list[tuple[NDArray, NDArray]]
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Gates for one precision of the graph against the float32 reference."""

    visual: float
    logits: float
    kv: float
    score_margin: float


# float16: graph in half precision against the float32 reference on the same (rounded) weights.
LIMITS = {
    "float32": Limits(visual=1e-4, logits=1e-4, kv=1e-4, score_margin=1e-6),
    "float16": Limits(visual=5e-2, logits=2e-1, kv=1e-1, score_margin=1e-3),
}


@dataclass
class Worst:
    """Keeps the worst of each metric over many answers."""

    limits: Limits
    values: dict[str, float] = field(default_factory=dict)
    unexplained: int = 0
    answers: int = 0

    def add(self, ours: Answer, theirs: Answer) -> None:
        """Compares `ours` with the rung before, `theirs`."""
        self.answers += 1
        self._max("vision features max abs", max_abs(ours.visual, theirs.visual))
        steps = min(len(ours.logits), len(theirs.logits))
        self._max("logits max abs", max_abs(ours.logits[:steps], theirs.logits[:steps]))
        self._max("logits KL (nats)", kl(theirs.logits[:steps], ours.logits[:steps]))
        for mine, reference in zip(ours.kv, theirs.kv, strict=True):
            for a, b in zip(mine, reference, strict=True):
                self._max("KV max abs", max_abs(a, b) if a.shape == b.shape else np.inf)
        self._sum("answers with other tokens", float(ours.tokens != theirs.tokens))
        other = 0
        for mine, reference, scores in zip(ours.selected, theirs.selected, theirs.scores, strict=True):
            gap = score_gap(scores, len(reference))
            self._min("smallest score gap at a cut", gap)
            if mine.tolist() != reference.tolist():
                other = 1
                self.unexplained += gap > self.limits.score_margin
        self._sum("answers with other selections", float(other))

    def metrics(self, prefix: str = "") -> tuple[Metric, ...]:
        """All metrics, with their gates."""
        limits = {
            "vision features max abs": self.limits.visual,
            "answers with other selections": 0.0,
            "logits max abs": self.limits.logits,
            "KV max abs": self.limits.kv,
            "answers with other tokens": 0.0,
        }
        # A selection that differs inside the margin makes everything after it differ: ambiguous, not wrong.
        tie = self.values.get("answers with other selections", 0.0) > 0 and self.unexplained == 0
        names = [*limits, "logits KL (nats)", "smallest score gap at a cut"]
        return tuple(
            Metric(
                name=prefix + name,
                value=self.values.get(name),
                limit=limits.get(name),
                ambiguous=tie and name != "vision features max abs",
                note="differs only where scores tie" if tie and "selections" in name else "",
            )
            for name in names
            if name in self.values
        )

    def _max(self, name: str, value: float) -> None:
        self.values[name] = max(self.values.get(name, 0.0), value) if np.isfinite(value) else np.inf

    def _min(self, name: str, value: float) -> None:
        self.values[name] = min(self.values.get(name, np.inf), value)

    def _sum(self, name: str, value: float) -> None:
        self.values[name] = self.values.get(name, 0.0) + value


def max_abs(a: NDArray, b: NDArray) -> float:
    """Largest absolute difference; infinite where a value is not a number."""
    if a.size == 0:
        return 0.0
    worst = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return worst if np.isfinite(worst) else np.inf


def kl(p_logits: NDArray, q_logits: NDArray) -> float:
    """Largest KL(p || q) over the rows of two [steps, V] arrays of logits, in nats."""
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum(axis=-1).max())


def log_softmax(logits: NDArray) -> NDArray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def score_gap(scores: NDArray, kept: int) -> float:
    """Distance between the lowest score that was kept and the highest that was not."""
    ranked = np.sort(scores)[::-1]
    return float(ranked[kept - 1] - ranked[kept]) if 0 < kept < len(ranked) else np.inf
