"""What ranks visual rows in the reference, in the words of the papers: no closed forms, nothing reused.

Shapes: S all rows of the prompt, V candidate visual rows, H heads, G key/value heads, C head size, D width.
`weights_HSS` is one layer's attention (query row, key row) in float32; `keys` are the sequence indices [V] of
the candidates. Scores are float32 [V].
"""

from __future__ import annotations

import numpy as np
import torch


def last_row_attention(weights_HSS: torch.Tensor, keys: np.ndarray) -> np.ndarray:
    """The last row's attention, mean over heads (FastV; PyramidDrop; HiDivDrop, section 3.3)."""
    return weights_HSS[:, -1, keys].cpu().numpy().mean(axis=0, dtype=np.float32)


def raters(embedded_SD: torch.Tensor, is_text: np.ndarray) -> np.ndarray:
    """SparseVLM's text raters, bool [S]: text rows after the image that are more like it than the mean is.

    Args:
        embedded_SD: token embeddings, and raw projector outputs for visual rows.
        is_text: bool [S].
    """
    chosen = np.zeros_like(is_text)
    visual = np.flatnonzero(~is_text)
    if visual.size:
        after = np.arange(visual[-1] + 1, len(is_text))
        likeness = embedded_SD[visual].float() @ embedded_SD[after].float().T
        relevance = torch.softmax(likeness, dim=1).mean(dim=0)
        chosen[after] = (relevance >= relevance.mean()).cpu().numpy()
    return chosen


def text_attention(weights_HSS: torch.Tensor, rater_S: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Attention from the raters, mean over heads, summed over raters (SparseVLM, section 3.2)."""
    return weights_HSS[:, np.flatnonzero(rater_S)].mean(dim=0).sum(dim=0)[keys].cpu().numpy()


def value_influence(weights_HSS: torch.Tensor, values_GSC: torch.Tensor, keys: np.ndarray) -> np.ndarray:
    """How far the last row's attention output (heads concatenated) moves without each token (VisiPruner)."""
    values_HSC = values_GSC.float().repeat_interleave(weights_HSS.shape[0] // values_GSC.shape[0], dim=0)
    contributions_VHC = weights_HSS[:, -1, keys].T[:, :, None] * values_HSC[:, keys].transpose(0, 1)
    return contributions_VHC.flatten(1).norm(dim=1).cpu().numpy()


def cross_and_self_attention(weights_HSS: torch.Tensor, is_text: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Attention from text rows times attention from visual rows, each the largest over heads (FitPrune)."""
    strongest_SS = weights_HSS.max(dim=0).values
    cross = strongest_SS[np.flatnonzero(is_text)].sum(dim=0)
    own = strongest_SS[keys].sum(dim=0)
    return (cross * own)[keys].cpu().numpy()


def random_order(seed: int, tokens: int, images: int) -> np.ndarray:
    """Score of each visual row [images * tokens]: its place in a permutation, the same in every image."""
    return np.tile(np.random.default_rng(seed).permutation(tokens), images).astype(np.float32)
