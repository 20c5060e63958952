"""The encoder stage's rules as the papers tell them, token by token. Slow, and nothing but loops.

Shapes: N visual tokens of one view ("patches" in the papers), S tower rows ([CLS] where there is one, then
the tower's own patches), H heads, E tower width, E' width that the projector reads, K rows kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimvlm.encoder_rules import EncoderStage, HiPrune, MsvPrune, PruMerge, VisionZip, VisPruner
from trimvlm.rules import RandomOrder


@dataclass(frozen=True, kw_only=True)
class View:
    """What the tower computed for one view, float32.

    Attributes:
        attentions: per layer [H, S, S].
        states: per hidden state [S, E].
        queries, keys: per layer the projections [S, E], biases included.
        features: [N, E'], what the projector reads; with [CLS] before it where that is a row, too.
        cls: row 0 of the tower is [CLS].
        columns: visual tokens in a row of the view; None: as many as there are rows.
        tokens: int64 [N, k], the tower rows that each visual token is made of; None: each patch is a token.
    """

    attentions: Sequence[np.ndarray]
    states: Sequence[np.ndarray]
    queries: Sequence[np.ndarray]
    keys: Sequence[np.ndarray]
    features: np.ndarray
    cls: bool = True
    tokens: np.ndarray | None = None
    columns: int | None = None

    @property
    def patches(self) -> int:
        """N."""
        return len(self.features) - self.cls if self.tokens is None else len(self.tokens)

    def rows(self, patch: int) -> list[int]:
        """Tower rows of a visual token."""
        return [self.cls + patch] if self.tokens is None else self.tokens[patch].tolist()

    def feature(self, patch: int) -> np.ndarray:
        """[E'], what the projector reads of a visual token."""
        return self.features[len(self.features) - self.patches + patch]

    def state(self, number: int, patch: int) -> np.ndarray:
        """[E], a hidden state of a visual token, mean over its rows."""
        return self.states[number][self.rows(patch)].mean(axis=0)

    def cls_attention(self, layer: int) -> list[float]:
        """Attention of [CLS] to each visual token, mean over heads and over its rows."""
        return [float(self.attentions[layer][:, 0, self.rows(p)].mean()) for p in range(self.patches)]

    def received(self, layer: int) -> list[float]:
        """Attention that each visual token receives, mean over heads, all rows and its own."""
        return [float(self.attentions[layer][:, :, self.rows(p)].mean()) for p in range(self.patches)]

    def ranking(self, rule: MsvPrune | VisPruner) -> list[float]:
        """The attention that the rule ranks by."""
        return self.received(rule.attention) if rule.received else self.cls_attention(rule.attention)


def reduce(stage: EncoderStage, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Rows [K, E'] float32 and the patches that they stem from, int64, in the order of the rows."""
    rule, keep = stage.by, stage.keep
    if isinstance(rule, VisionZip):
        rows, chosen = _visionzip(rule, keep, view)
    elif isinstance(rule, PruMerge):
        rows, chosen = _prumerge(rule, keep, view)
    else:
        if isinstance(rule, MsvPrune):
            chosen = _msv_prune(rule, keep, view)
        elif isinstance(rule, VisPruner):
            chosen = _vispruner(rule, keep, view)
        elif isinstance(rule, HiPrune):
            chosen = _hiprune(rule, keep, view)
        else:
            chosen = _random(rule, keep, view)
        chosen = sorted(chosen)
        rows = [view.feature(p) for p in chosen]
    return np.stack(rows).astype(np.float32), np.array(chosen, np.int64)


def _best(scores: Sequence[float], count: int) -> list[int]:
    """The highest, ties to the lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    length = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / length if length else 0.0


def _random(rule: RandomOrder, keep: int, view: View) -> list[int]:
    places = np.random.default_rng(rule.seed).permutation(view.patches)
    return _best([float(place) for place in places], keep)


def _hiprune(rule: HiPrune, keep: int, view: View) -> list[int]:
    """Anchors and their neighbours, then what the deep layer attends to most, until the budget is full."""
    side, last = view.columns or math.isqrt(view.patches), view.patches - 1
    marked: set[int] = set()
    for anchor in _best(view.received(rule.object_layer), round(keep * rule.alpha / 5)):
        for neighbour in (anchor, anchor - 1, anchor + 1, anchor - side, anchor + side):
            marked.add(max(0, min(last, neighbour)))
    deep = _best(view.received(rule.deep_layer), view.patches)
    chosen = [p for p in deep if p in marked][:keep]
    for patch in deep:
        if len(chosen) < keep and patch not in marked:
            chosen.append(patch)
    return chosen


def _vispruner(rule: VisPruner, keep: int, view: View) -> list[int]:
    order = _best(view.ranking(rule), view.patches)
    important = int(keep * rule.important)
    residual, wanted = order[important:], keep - important
    if not wanted:
        return order[:important]
    # Near doubles decide: float64.
    states = [view.state(rule.features, p).astype(np.float64) for p in range(view.patches)]
    while len(residual) > wanted:
        pairs = len(residual) // 2
        evens = [residual[2 * i] for i in range(pairs)]
        odds = [residual[2 * i + 1] for i in range(pairs)]
        alike = [max(_cosine(states[a], states[b]) for b in odds) for a in evens]
        falling = [evens[i] for i in _best(alike, pairs)]
        drop = min(8, len(residual) - wanted, pairs)
        residual = falling[drop:] + odds + residual[2 * pairs :]
    return order[:important] + residual


def _msv_prune(rule: MsvPrune, keep: int, view: View) -> list[int]:
    anchors = _best(view.ranking(rule), int(keep * rule.anchors))
    missing = keep - len(anchors)
    if not missing:
        return anchors
    rest = [p for p in range(view.patches) if p not in anchors]
    last, middle = ([view.state(n, p) for p in range(view.patches)] for n in (rule.last, rule.middle))
    near = {p: max((_cosine(last[p], last[a]) for a in anchors), default=0.0) for p in rest}
    clusters = _clusters([last[p] for p in rest], rule)
    groups = [[p for p, c in zip(rest, clusters, strict=True) if c == k] for k in range(rule.clusters)]
    chosen = list(anchors)
    for group, quota in zip(groups, _quotas([len(group) for group in groups], missing), strict=True):
        scores = []
        for i in group:
            pairs = [
                _cosine(last[i], last[j]) + _cosine(middle[i], middle[j]) + (near[i] + near[j])
                for j in group
                if j != i
            ]
            scores.append(sum(pairs) / len(pairs) if pairs else 0.0)
        lowest = sorted(range(len(group)), key=lambda n, scores=scores: (scores[n], n))
        chosen += [group[n] for n in lowest[:quota]]
    return chosen


def _clusters(points: list[np.ndarray], rule: MsvPrune) -> list[int]:
    """K-means: start far apart, then Lloyd steps."""

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(((a - b) * (a - b)).sum())

    def nearest(point: np.ndarray) -> int:
        return min(range(len(centres)), key=lambda k: (distance(point, centres[k]), k))

    mean = np.mean(points, axis=0)
    centres = [points[_best([distance(point, mean) for point in points], 1)[0]]]
    while len(centres) < rule.clusters:
        away = [min(distance(point, centre) for centre in centres) for point in points]
        centres.append(points[_best(away, 1)[0]])
    for _ in range(rule.iterations):
        belongs = [nearest(point) for point in points]
        for k in range(rule.clusters):
            members = [point for point, b in zip(points, belongs, strict=True) if b == k]
            if members:
                centres[k] = np.mean(members, axis=0)
    return [nearest(point) for point in points]


def _quotas(sizes: list[int], total: int) -> list[int]:
    """Equation (2), then one token more or less at a time, in the largest cluster that can take it."""
    quotas = [max(1, round(total * size / sum(sizes))) if size else 0 for size in sizes]
    while sum(quotas) != total:
        change = 1 if sum(quotas) < total else -1
        for k in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
            if 1 <= quotas[k] + change <= sizes[k]:
                quotas[k] += change
                break
    return quotas


def _visionzip(rule: VisionZip, keep: int, view: View) -> tuple[list[np.ndarray], list[int]]:
    features = view.features[1:]
    heads = view.attentions[rule.keys].shape[0]
    keys = [row.reshape(heads, -1).mean(axis=0) for row in view.keys[rule.keys][1:]]
    summed = [float(view.attentions[rule.attention][:, 0, 1 + p].sum()) for p in range(view.patches)]
    dominant = sorted(_best(summed, keep - rule.contextual - 1))
    rows = [view.features[0], *(features[p] for p in dominant)]
    rest = [p for p in range(view.patches) if p not in dominant]
    step = max(1, len(rest) // rule.contextual) if rule.contextual else 1
    targets = [rest[n * step] for n in range(rule.contextual)]
    went: dict[int, list[np.ndarray]] = {target: [] for target in targets}
    for patch in rest:
        if targets and patch not in went:
            alike = [_cosine(keys[patch], keys[target]) for target in targets]
            went[targets[_best(alike, 1)[0]]].append(features[patch])
    for target in targets:
        merged = np.mean(went[target], axis=0) if went[target] else 0.0
        rows.append(features[target] + merged)
    return rows, dominant + targets


def _prumerge(rule: PruMerge, keep: int, view: View) -> tuple[list[np.ndarray], list[int]]:
    queries, keys, features = view.queries[rule.layer], view.keys[rule.layer], view.features[1:]
    logits = np.array([float(queries[0] @ key) / math.sqrt(len(key)) for key in keys])
    weights = np.exp(logits - logits.max())
    attention = (weights / weights.sum())[1:].tolist()
    chosen = _best(attention, keep - 1)
    rows = []
    for patch in chosen:
        others = [p for p in range(view.patches) if p != patch]
        alike = [_cosine(keys[1 + patch], keys[1 + other]) for other in others]
        row = features[patch].copy()
        for n in _best(alike, rule.neighbours):
            row = row + attention[others[n]] * features[others[n]]
        rows.append(row)
    rest = np.zeros_like(features[0])
    for patch in range(view.patches):
        if patch not in chosen:
            rest = rest + attention[patch] * features[patch]
    return [*rows, rest], chosen
