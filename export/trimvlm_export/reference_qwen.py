"""What transformers' own Qwen2-VL and Qwen2.5-VL towers compute for the reference's encoder stage.

Shapes: N visual tokens of one image, S patches (4 N), E tower width, H heads.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimvlm_export.reference_encoder_rules import View
from trimvlm_export.reference_views import ImageViews, recorded

RECORDED = "trimvlm_recorded"  # the name of eager attention that keeps its weights


def reference_views(model: Any, inputs: Mapping[str, Any]) -> Iterator[ImageViews]:
    """For each image its one view; tower rows are patches in the order in which transformers computes them.

    Args:
        model: transformers' Qwen2-VL or Qwen2.5-VL model.
        inputs: `pixel_values` [patches of all images, 3 * 2 * 14 * 14] and `image_grid_thw` [images, 3].
    """
    grids = inputs["image_grid_thw"]
    for pixels, grid in zip(inputs["pixel_values"].split(grids.prod(-1).tolist()), grids, strict=True):
        yield ImageViews(1, partial(_see, model.model.visual, pixels, grid))


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """transformers' merger: features [rows, 4 E] -> visual [rows, D]."""
    merger = model.model.visual.merger
    return merger(rows.reshape(-1, merger.ln_q.weight.shape[0]))


def _see(visual: Any, pixels: Tensor, grid: Tensor, number: int) -> View:
    """The view of an image."""
    assert number == 0
    layers = [block.attn for block in visual.blocks]
    with (
        recorded(layers, "qkv") as projections,
        _states(visual) as states,
        _attention(visual) as windows,
    ):
        visual(pixels, grid_thw=grid[None])
    query, key, _ = zip(*(each.chunk(3, dim=1) for each in projections), strict=True)
    tokens = _tokens(visual, *(int(side) // visual.spatial_merge_size for side in grid[1:]))
    return View(
        attentions=[_whole(windows[layer]) for layer in layers],
        states=[_array(state) for state in states],
        queries=[_array(each) for each in query],
        keys=[_array(each) for each in key],
        features=_array(states[-1])[tokens].reshape(len(tokens), -1),
        cls=False,
        tokens=tokens,
        columns=int(grid[2]) // visual.spatial_merge_size,
    )


@contextlib.contextmanager
def _states(visual: Any) -> Iterator[list[Tensor]]:
    """Collects the hidden states [S, E]: what the first layer gets, and what each layer gives."""
    found: list[Tensor] = []
    hooks = [visual.blocks[0].register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))]
    hooks += [
        block.register_forward_hook(lambda module, inputs, output: found.append(output))
        for block in visual.blocks
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _attention(visual: Any) -> Iterator[dict[Any, list[Tensor]]]:
    """Collects attention weights [1, H, P, P] of each layer, window by window: towers give none."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    found: dict[Any, list[Tensor]] = {}
    eager = sys.modules[type(visual).__module__].eager_attention_forward

    def keeping(module: Any, *arguments: Any, **options: Any) -> Any:
        output, weights = eager(module, *arguments, **options)
        found.setdefault(module, []).append(weights)
        return output, weights

    before = visual.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[RECORDED] = keeping
    visual.config._attn_implementation = RECORDED
    try:
        yield found
    finally:
        visual.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[RECORDED]


def _whole(windows: list[Tensor]) -> np.ndarray:
    """Attention of all patches [1, S, S], none between windows. The mean over heads stands for them all:
    without [CLS], rules read nothing else."""
    return _array(torch.block_diag(*(weights[0].float().mean(0) for weights in windows)))[None]


def _tokens(visual: Any, rows: int, columns: int) -> np.ndarray:
    """The tower rows of each visual token, int64 [N, 4]: windows row by row, and tokens in them."""
    unit = visual.spatial_merge_size
    side = getattr(visual, "window_size", 0) // unit // visual.config.patch_size or max(rows, columns)
    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    order = sorted(tokens, key=lambda token: (token[0] // side, token[1] // side, token))
    places = {token: place for place, token in enumerate(order)}
    return np.array([[places[token] * unit**2 + patch for patch in range(unit**2)] for token in tokens])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
