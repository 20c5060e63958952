"""Inputs for a decoder's prefill: one image and one prompt, random values, real positions."""

from __future__ import annotations

import numpy as np

from trimvlm.rules import RouterScores
from trimvlm.schedule import Schedule

# Shapes: T text rows, N visual rows, D width, G key/value heads, C head size.


def prefill_feeds(
    schedule: Schedule, *, text: int, before_image: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Arrays for a decoder graph's prefill, as `trimvlm.bundle` lists them.

    Args:
        schedule: of the profile that the graph was exported with.
        text: text rows T, at least one of them after the image.
        before_image: text rows before the image.
        seed: two graphs of one model get the same ids and visual rows.
    """
    model = schedule.model
    assert 0 <= before_image < text
    ids, visual_ND = (
        token_ids(model.vocab, text, seed),
        visual_rows(schedule.visual_tokens, model.hidden, seed),
    )
    positions = np.arange(text + schedule.visual_tokens)
    image = slice(before_image, before_image + schedule.visual_tokens)
    feeds = {
        "input_ids": ids,
        "visual": visual_ND,
        "text_positions": np.delete(positions, image),
        "visual_positions": positions[image],
    }
    if any(row.select and isinstance(row.select.by, RouterScores) for row in schedule.rows):
        feeds["router_scores"] = np.random.default_rng([seed, 2]).random(len(visual_ND), np.float32)
    for stage in range(len(schedule.stages)):
        feeds[f"forced.{stage}"] = np.zeros(0, np.int64)
    for stage in range(len(schedule.skip_stages)):
        feeds[f"forced_skip.{stage}"] = np.zeros(0, np.int64)
    empty = np.zeros((1, model.kv_heads, 0, model.head_dim), np.float32)
    for row in schedule.rows:
        if row.attends:
            feeds[f"past_key.{row.layer}"] = feeds[f"past_value.{row.layer}"] = empty
    for stage in schedule.masks:
        feeds[f"past_visible.{stage}"] = np.zeros(0, np.bool_)
    return feeds


def token_ids(vocab: int, text: int, seed: int) -> np.ndarray:
    """int64 [T]."""
    return np.random.default_rng(seed).integers(0, vocab, text)


def visual_rows(count: int, width: int, seed: int) -> np.ndarray:
    """float32 [N, D], of the size of normalised activations."""
    return np.random.default_rng([seed, 1]).standard_normal((count, width), dtype=np.float32)
