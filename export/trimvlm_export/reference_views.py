"""What transformers' own towers compute for the reference's encoder stage, view by view.

Shapes: I views, N visual tokens of one view, S tower rows ([CLS] where there is one, then patches), E tower
width, E' width that the projector reads, H heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimvlm_export.reference_encoder_rules import View


@dataclass(frozen=True)
class ImageViews:
    """The views of one image, in the order of the vision graph.

    Attributes:
        count: how many.
        see: from the number of a view to what the tower computes for it. One at a time: all the attention of
            one view of a real tower is a gigabyte.
    """

    count: int
    see: Callable[[int], View]


def patch_views(model: Any, pixel_values: Tensor) -> ImageViews:
    """Views of a CLIP or SigLIP tower, where visual tokens are patches.

    Args:
        model: one of transformers' LLaVA models.
        pixel_values: float [I, 3, H, W].
    """
    tower, wanted = model.model.vision_tower, model.config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)

    def see(number: int) -> View:
        layers = [layer.self_attn for layer in tower.encoder.layers]
        with recorded(layers, "q_proj") as queries, recorded(layers, "k_proj") as keys:
            seen = watch(tower, pixel_values[number])
        return View(
            attentions=arrays(seen.attentions),
            states=arrays(seen.hidden_states),
            queries=arrays(queries),
            keys=arrays(keys),
            features=array(torch.cat([seen.hidden_states[n] for n in wanted], dim=-1)),
            cls=hasattr(tower.embeddings, "class_embedding"),
        )

    return ImageViews(len(pixel_values), see)


def watch(tower: Any, pixels: Tensor) -> Any:
    """The tower's output for one view [3, H, W] or whatever it takes, attention weights included."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")  # elsewhere there are no attention weights
    try:
        return tower(pixels[None], output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(before)


@contextlib.contextmanager
def recorded(parts: list[Any], name: str) -> Iterator[list[Tensor]]:
    """Collects what the submodule `name` of each of `parts` gives, biases included, in the order of calls."""
    found: list[Tensor] = []
    hooks = [
        getattr(part, name).register_forward_hook(lambda module, inputs, output: found.append(output))
        for part in parts
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def arrays(batches: Any) -> list[np.ndarray]:
    """The one entry of each batch, float32."""
    return [array(batch) for batch in batches]


def array(batch: Tensor) -> np.ndarray:
    """The one entry of a batch, float32."""
    assert len(batch) == 1
    return batch[0].float().cpu().numpy()
