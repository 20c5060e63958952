"""M-RoPE: every row has three coordinates (time, row, column) that its rotary angles follow (Qwen2-VL, 2.1).

Those of a text row are equal. The tokens of an image lie on its grid, and the text goes on after the longer
side of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimvlm.profile import Grid
from trimvlm.text import Prompt


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a prompt's rows lie.

    Attributes:
        text: int64 [3, T].
        visual: int64 [3, N].
        lag: how far the coordinate of a generated token is behind its position.
    """

    text: NDArray[np.int64]
    visual: NDArray[np.int64]
    lag: int


def coordinates(
    prompt: Prompt, grid: Grid, *, full: int, patches: Sequence[NDArray[np.int64]] = ()
) -> Coordinates:
    """Coordinates of a prompt's rows.

    Args:
        grid: rows and columns of tokens of every image.
        full: positions that the prompt gives to one image.
        patches: for each image the tokens that an encoder stage left, in the order of its rows; none: all.
    """
    rows, columns = grid
    images = len(prompt.visual_positions) // full
    lag = full - max(rows, columns)  # for each image before
    first_M = prompt.visual_positions.reshape(images, full)[:, 0]
    before_T = np.searchsorted(first_M, prompt.text_positions)
    text_T = prompt.text_positions - lag * before_T
    starts_M = first_M - lag * np.arange(images)
    chosen = patches or [np.arange(rows * columns)] * images
    visual = [
        np.stack((np.full(len(tokens), start), start + tokens // columns, start + tokens % columns))
        for start, tokens in zip(starts_M, chosen, strict=True)
    ]
    return Coordinates(
        text=np.broadcast_to(text_T, (3, len(text_T))),
        visual=np.concatenate(visual, axis=1) if visual else np.zeros((3, 0), np.int64),
        lag=lag * images,
    )
