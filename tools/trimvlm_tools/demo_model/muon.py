"""Muon for many small matrices: the orthogonalisation runs on stacks of equal shapes, in batched products.

After Jordan et al., "Muon: an optimizer for hidden layers" (2024), with the update scaled to AdamW's size
as in Liu et al., "Muon is scalable for LLM training" (2025, equation 4); `torch.optim.Muon` does the same
one by one.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from trimvlm_tools.demo_model.team import ALONE, Team

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of a stack of matrices [n, rows, columns] towards 1 (Newton-Schulz, bf16)."""
    x = update.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; decoupled weight decay. Parameters must be matrices.

    Args:
        params: Matrices or parameter groups of them.
        lr: Learning rate.
        momentum: Of the Nesterov momentum.
        weight_decay: Decoupled, scaled by the rate.
        team: The processes that train together; each orthogonalises its share and reads the others'.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
        team: Team = ALONE,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.team = team

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        stacks: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        todo: list[tuple[dict, Tensor, Tensor]] = []
        start = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                place = self.team.board(start, parameter.numel()).view_as(parameter)
                if len(todo) % self.team.size == self.team.rank:
                    nesterov = parameter.grad.lerp(state["momentum"], group["momentum"])
                    stacks[parameter.shape].append((place, nesterov))
                todo.append((group, parameter, place))
                start += parameter.numel()
        for pairs in stacks.values():
            updates = orthogonalize(torch.stack([nesterov for _, nesterov in pairs]))
            for (place, _), update in zip(pairs, updates, strict=True):
                place.copy_(update)
        self.team.wait()
        for group, parameter, place in todo:
            scale = 0.2 * max(parameter.shape) ** 0.5
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(place, alpha=-group["lr"] * scale)
        self.team.wait()
