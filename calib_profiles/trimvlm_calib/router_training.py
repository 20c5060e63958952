"""Training of a router on a frozen model: preferences between random actions, without a reference policy
(Pruning All-Rounder, section 4.2).

An action keeps some visual tokens and some layers. Under the router's log-odds z its probability is a product
of independent choices. So if two actions keep a and b (0 or 1 for each token and layer), then
log P(a) - log P(b) = sum of z (a - b); a pair's loss is -log sigmoid of beta times this, a the better one.

Shapes: N visual rows, R layers that may be skipped, A actions of one sample, B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from trimvlm_export.router import Router

RouterInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # arguments of Router.forward


@dataclass(frozen=True, kw_only=True)
class Actions:
    """Random actions on one sample.

    Attributes:
        preference: float32 [A, N]: the tokens with the highest values are kept.
        tokens: bool [A, N], kept.
        layers: bool [A, R], executed.
    """

    preference: np.ndarray
    tokens: np.ndarray
    layers: np.ndarray


def draw_actions(
    generator: np.random.Generator, scores_N: np.ndarray, *, count: int, keep: int, noise: float, layers: int,
    skip: int,
) -> Actions:  # fmt: skip
    """Draws actions on one sample.

    Args:
        scores_N: what the ranking starts from: FastV's scores.
        count: actions, A.
        keep: tokens that each keeps, by rank plus Gaussian noise; all N of them: no noise is needed.
        noise: standard deviation of the noise, in ranks.
        layers: candidates, R.
        skip: how many of them each leaves out, at random.
    """
    ranks_N = np.argsort(np.argsort(scores_N, kind="stable"), kind="stable")
    preference = (ranks_N + noise * generator.standard_normal((count, ranks_N.size))).astype(np.float32)
    tokens = np.zeros(preference.shape, dtype=bool)
    np.put_along_axis(tokens, np.argsort(-preference, axis=1, kind="stable")[:, :keep], True, axis=1)
    executed = np.ones((count, layers), dtype=bool)
    for row in executed:
        row[generator.permutation(layers)[:skip]] = False
    return Actions(preference=preference, tokens=tokens, layers=executed)


def preferences(actions: Actions, divergences_A: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Every action of the better half against every one of the worse half.

    Args:
        divergences_A: from the unpruned output; of an odd number of actions the middle one is left out.

    Returns:
        What the better one keeps minus what the worse one keeps, float32 [pairs, N] and [pairs, R].
    """
    order = np.argsort(np.asarray(divergences_A), kind="stable")
    half = len(order) // 2
    better, worse = np.repeat(order[:half], half), np.tile(order[len(order) - half :], half)

    def difference(kept: np.ndarray) -> np.ndarray:
        return kept[better].astype(np.float32) - kept[worse].astype(np.float32)

    return difference(actions.tokens), difference(actions.layers)


def preference_loss(
    scores: tuple[torch.Tensor, torch.Tensor], pairs: tuple[np.ndarray, np.ndarray], beta: float
) -> torch.Tensor:
    """Mean loss over the pairs of one sample.

    Args:
        scores: the router's, of tokens [N] and layers [R].
        pairs: differences, see `preferences`.
    """
    margins = sum(torch.from_numpy(part).to(score) @ score for part, score in zip(pairs, scores, strict=True))
    return -F.logsigmoid(beta * torch.as_tensor(margins)).mean()


def train(
    router: Router,
    inputs_of: Callable[[int], RouterInputs],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    steps: int,
    batch: int,
    rate: float,
    beta: float,
    seed: int,
    told: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Trains in place with AdamW; the rate rises over a tenth of the steps and falls to zero (cosine).

    Args:
        inputs_of: a sample's inputs by its number, on the router's device.
        pairs: per sample, what `preferences` gives.
        batch: samples per step, drawn in seeded permutations of all of them.
        told: called after every step with how many there were.

    Returns:
        Mean loss of each step's pairs, before the step.
    """
    optimizer = torch.optim.AdamW(router.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        after = max(0.0, (step - warm) / max(1, steps - warm))
        return min((step + 1) / warm, 0.5 * (1 + float(np.cos(np.pi * after))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = np.random.default_rng([seed, 1])
    queue: list[int] = []
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(batch):
            queue = queue or generator.permutation(len(pairs)).tolist()
            sample = queue.pop()
            inputs = inputs_of(sample)
            loss = preference_loss(router(*inputs), pairs[sample], beta) / batch
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(total)
        told(step + 1)
    return losses


@torch.no_grad()
def router_inputs(model: Any, inputs: Mapping[str, Any], features: torch.Tensor) -> RouterInputs:
    """What the router is given of a prompt.

    Args:
        model: the Hugging Face model.
        inputs: what its processor gave: `input_ids` [1, S] with expanded image tokens.
        features: projector outputs of its images [N, D], see `Reference.features`.
    """
    ids_S = inputs["input_ids"][0].to(model.device)
    visual_S = ids_S == model.config.image_token_id
    text, visual = (torch.nonzero(rows)[:, 0] for rows in (~visual_S, visual_S))
    embedded_TD = model.model.language_model.embed_tokens(ids_S[text]).float()
    return embedded_TD, features.to(model.device).float(), text, visual
