"""ASL-Skip's accumulator in the reference (SPIDER, section 3.2; staged, see `SkipMode`).

Shapes: V live visual rows, T text rows, D width, vocabulary W rows of the LM head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trimvlm.profile import SkipMode
from trimvlm_export.reference_rows import best


@dataclass
class Skipping:
    """Which visual rows skip, and what ranks the others.

    Attributes:
        accumulator: float32 [M*N], over all visual rows.
        rows: bool [M*N]: rows in skip mode.
    """

    accumulator: np.ndarray
    rows: np.ndarray

    @classmethod
    def none(cls, visual: int) -> Skipping:
        """Before the first stage."""
        return cls(accumulator=np.zeros(visual, np.float32), rows=np.zeros(visual, bool))

    def advance(self, growth: np.ndarray, live: np.ndarray, count: int) -> None:
        """One stage: the accumulator grows, and the highest rows join those that skip until `count` do.

        Args:
            growth: float32 [V], of the rows in `live`, which are visual row numbers, ascending.
            count: rows in skip mode afterwards.
        """
        self.accumulator[live] += growth
        others = live[~self.rows[live]]
        joining = others[best(self.accumulator[others], count - int(self.rows.sum()))]
        self.rows[joining] = True


def redundancy_growth(
    mode: SkipMode, visual_VD: torch.Tensor, text_TD: torch.Tensor, head_WD: torch.Tensor
) -> np.ndarray:
    """ReLU(1 - R) of each live visual row, float32 [V]."""
    redundancy = torch.zeros(len(visual_VD), device=visual_VD.device)
    if mode.entropy:
        log_p = torch.log_softmax(visual_VD.float() @ head_WD.float().T, dim=1)
        redundancy += _scaled(-(log_p.exp() * log_p).sum(dim=1))
    if mode.correlation:
        mean_text = text_TD.float().mean(dim=0, keepdim=True)
        redundancy += _scaled(torch.cosine_similarity(visual_VD.float(), mean_text, dim=1))
    return torch.relu(1 - redundancy).cpu().numpy()


def _scaled(term: torch.Tensor) -> torch.Tensor:
    """To 0..1 by its least and greatest value; a constant term is 0."""
    if not len(term) or term.max() == term.min():
        return torch.zeros_like(term)
    return (term - term.min()) / (term.max() - term.min())
