"""The prompt of the decoder's workload: the same token ids for every contender.

A decoder that takes ids alone reads all of them. Ours gets the image's part as visual rows, which are the
embeddings of those ids: the same function of the same rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trimvlm.value import Value

TEXT_BEFORE_IMAGE = 2
_LOWEST, _HIGHEST = 16, 150_000  # ids that no model here has a special meaning for

# Shapes: S rows of the prompt, T text rows, N visual rows, V vocabulary, D width.


class Point(Value, frozen=True, kw_only=True):
    """Sizes of one workload: visual rows and text rows of the prompt, tokens that are generated."""

    visual: int
    text: int
    new_tokens: int

    @property
    def name(self) -> str:
        """For files and people."""
        return f"{self.visual}+{self.text}"


def prompt_ids(point: Point, vocab: int, seed: int) -> NDArray[np.int64]:
    """int64 [S]: text, image, text."""
    count = point.visual + point.text
    return np.random.default_rng(seed).integers(_LOWEST, min(vocab, _HIGHEST), count)


def decoder_rows(
    ids_S: NDArray[np.int64], visual: int, visual_ND: NDArray[np.float32]
) -> dict[str, np.ndarray]:
    """The fields of a `trimvlm.text.Prompt` and the visual rows.

    Args:
        visual: ids of `ids_S` that are the image's.
        visual_ND: rows that the decoder gets of it, all or, after an encoder stage, fewer.
    """
    text_ids = np.delete(ids_S, image_part(visual))
    positions = np.arange(len(text_ids) + len(visual_ND))
    image = image_part(len(visual_ND))
    return {
        "input_ids": text_ids,
        "text_positions": np.delete(positions, image),
        "visual_positions": positions[image],
        "visual": visual_ND,
    }


def image_part(visual: int) -> slice:
    """Where the image's ids are in the prompt."""
    return slice(TEXT_BEFORE_IMAGE, TEXT_BEFORE_IMAGE + visual)


def embedding_rows(checkpoint: Path, ids_N: NDArray[np.int64]) -> NDArray[np.float32]:
    """float32 [N, D] of a float32 checkpoint, read row by row.

    Raises:
        KeyError: it has no or several embeddings of tokens.
    """
    from trimvlm_export.checkpoint import read_header, weight_files

    tensors = [
        tensor
        for file in weight_files(checkpoint)
        for tensor in read_header(file)
        if tensor.name.endswith("embed_tokens.weight")
    ]
    if len(tensors) != 1:
        raise KeyError(f"{checkpoint}: {len(tensors)} embeddings of tokens")
    (found,) = tensors
    table_VD = np.memmap(found.file, np.float32, "r", found.offset, found.shape)
    return np.array(table_VD[ids_N])
