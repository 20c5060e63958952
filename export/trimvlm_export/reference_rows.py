"""Rows, positions, visibility and attention for the reference, in plain words.

Shapes: S all rows of the prompt, T text rows, N visual rows of one image, H heads, G key/value heads, C head
size, Q query rows, P keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimvlm.errors import UserError
from trimvlm.schedule import Row


@dataclass(frozen=True)
class PromptRows:
    """Which rows of a prompt are what.

    Attributes:
        is_text: bool [S].
        visual: int64 [M*N], sequence index of each visual row.
        images: M.
        coordinates: int64 [3, S] for M-RoPE; None: the positions say it all.
    """

    is_text: np.ndarray
    visual: np.ndarray
    images: int
    coordinates: torch.Tensor | None = None

    @classmethod
    def of(
        cls, ids: torch.Tensor, attention_mask: torch.Tensor | None, image_token: int, tokens: int
    ) -> PromptRows:
        """Reads the rows off `ids` [1, S], which hold `tokens` image tokens for each image.

        Raises:
            UserError: several prompts, padding, an image at the end, or a wrong number of image tokens.
        """
        if ids.shape[0] != 1 or (attention_mask is not None and not bool(attention_mask.all())):
            raise UserError("the reference runs one prompt at a time, without padding")
        is_text = (ids[0] != image_token).cpu().numpy()
        if not is_text[-1]:
            raise UserError("the prompt ends in an image; put text after it, selections rank by the last row")
        visual = np.flatnonzero(~is_text)
        images, rest = divmod(len(visual), tokens)
        if rest:
            raise UserError(
                f"the prompt has {len(visual)} image tokens, not a multiple of the {tokens} per image that "
                "the profile is for"
            )
        return cls(is_text=is_text, visual=visual, images=images)

    def position_ids(self, live: np.ndarray, positions: str) -> torch.Tensor:
        """RoPE positions [1, S]: the place in the full sequence, or (`compact`) the place among live rows;
        with M-RoPE [3, 1, S]."""
        if self.coordinates is not None:
            return self.coordinates[:, None]
        places = np.maximum(live.cumsum() - 1, 0) if positions == "compact" else np.arange(len(live))
        return torch.from_numpy(places.astype(np.int64))[None]

    def next_position(self, live: np.ndarray, positions: str) -> int:
        """RoPE position of the first generated token."""
        if self.coordinates is not None:
            return int(self.coordinates.max()) + 1
        return int(live.sum()) if positions == "compact" else len(live)

    def cut(self, coordinates: torch.Tensor, patches: Sequence[np.ndarray]) -> torch.Tensor:
        """`coordinates` [3, S] of the text rows and, of each image, of the rows numbered in `patches`."""
        assert len(patches) == self.images, "give the patches that the encoder stage chose"
        whole = self.visual.reshape(self.images, -1)
        order = np.arange(len(self.is_text)).tolist()
        for image, chosen in zip(whole, patches, strict=True):
            start = order.index(image[0])
            order[start : start + len(image)] = image[chosen].tolist()
        return coordinates[:, order]

    def causal(self, live: np.ndarray) -> torch.Tensor:
        """Visibility bool [S, S]: a row sees live keys that do not come after it."""
        size = len(live)
        return torch.ones(size, size, dtype=torch.bool).tril() & torch.from_numpy(live)

    def hidden_keys(self, row: Row) -> torch.Tensor:
        """Visual keys bool [S, S] that `text_keys` and `visual_keys` hide at prefill."""
        blind_S = np.where(self.is_text, row.text_keys != "live", row.visual_keys == "none")
        return torch.from_numpy(blind_S[:, None] & ~self.is_text[None])

    def sink(self, live: np.ndarray) -> torch.Tensor:
        """Bool [S, S]: where the weight goes that a text row loses, the first live visual row."""
        first_S = np.zeros_like(live)
        first_S[np.flatnonzero(live & ~self.is_text)[:1]] = True
        return torch.from_numpy(self.is_text[:, None] & first_S[None])


def cut_images(ids: torch.Tensor, image_token: int, tokens: int, keep: int) -> torch.Tensor:
    """`ids` [1, S] with `keep` image tokens for each image instead of `tokens`."""
    images = ids[0] == image_token
    place = (images.cumsum(0) - 1) % tokens
    return ids[:, ~images | (place < keep)]


def attention(  # noqa: PLR0917 - transformers' signature
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    visible: torch.Tensor,
    zeroed: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as the textbook has it, in float32, as a transformers attention function.

    Args:
        query: [1, H, Q, C].
        key, value: [1, G, P, C].
        attention_mask: None; `visible` says it all.
        visible: bool [Q, P]: keys that take part in the softmax. A row that sees none gets zeros.
        zeroed: bool [Q, P]: weights set to zero after the softmax, without renormalising (VisiPruner's code).
        sink: bool [Q, P], at most one key a row: gets what `zeroed` took from the row.

    Returns:
        Output [1, Q, H, C] in the query's dtype, and weights float32 [1, H, Q, P].
    """
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key = key.float().repeat_interleave(groups, dim=1)
    value = value.float().repeat_interleave(groups, dim=1)
    scores = query.float() @ key.transpose(2, 3) * scaling
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).nan_to_num(0.0)
    if zeroed is not None:
        lost = (weights * zeroed).sum(dim=-1, keepdim=True)
        weights = weights.masked_fill(zeroed, 0.0)
        if sink is not None:
            weights = weights + lost * sink
    return (weights @ value).to(query.dtype).transpose(1, 2), weights


ATTENTION = "trimvlm_reference"
ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices int64 [count] of the highest scores, ascending; of equal scores the lower index wins."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])
