"""The encoder stage in the reference: the untouched tower with its own attention outputs, rules as loops.

Shapes: M images, N patches, S tower rows ([CLS], then patches), E tower width, D model width, K rows kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimvlm.encoder_rules import EncoderStage
from trimvlm_export.reference_encoder_rules import View, reduce


@torch.no_grad()
def reduced_features(
    model: Any, pixel_values: Tensor, stage: EncoderStage
) -> tuple[Tensor, list[np.ndarray]]:
    """Visual rows of images under an encoder stage, as the decoder gets them.

    Args:
        model: transformers' LlavaForConditionalGeneration.
        pixel_values: float [M, 3, H, W].

    Returns:
        Projector outputs [M * K, D], image by image, and for each image the patches that its rows stem from,
        int64, in the order of the rows.
    """
    tower, wanted = model.model.vision_tower, model.config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    with _eager(tower), _projections(tower) as projections:
        seen = tower(pixel_values, output_attentions=True, output_hidden_states=True)
    rows, chosen = [], []
    for image in range(len(pixel_values)):
        view = View(
            attentions=[_numpy(layer[image]) for layer in seen.attentions],
            states=[_numpy(state[image]) for state in seen.hidden_states],
            queries=[_numpy(layer[image]) for layer in projections["q_proj"]],
            keys=[_numpy(layer[image]) for layer in projections["k_proj"]],
            features=_numpy(torch.cat([seen.hidden_states[n][image] for n in wanted], dim=-1)),
        )
        features_KE, patches = reduce(stage, view)
        rows.append(torch.as_tensor(features_KE).to(pixel_values))
        chosen.append(patches)
    return model.model.multi_modal_projector(torch.stack(rows)).flatten(0, 1), chosen


@contextlib.contextmanager
def _eager(tower: Any) -> Iterator[None]:
    """Attention weights exist only where attention is computed step by step."""
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(before)


@contextlib.contextmanager
def _projections(tower: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Collects what `q_proj` and `k_proj` of every layer give, biases included: [M, S, E] each."""
    found: dict[str, list[Tensor]] = {"q_proj": [], "k_proj": []}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda module, inputs, output, name=name: found[name].append(output)
        )
        for layer in tower.encoder.layers
        for name in found
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
