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

# What two implementations in float32 differ by; a choice that such noise changes is a tie.
DISTURBANCE, TRIES = 1e-5, 8


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
    rows, chosen = [], []
    for view in _views(model, pixel_values):
        features_KE, patches = reduce(stage, view)
        rows.append(torch.as_tensor(features_KE).to(pixel_values))
        chosen.append(patches)
    return model.model.multi_modal_projector(torch.stack(rows)).flatten(0, 1), chosen


@torch.no_grad()
def hangs_on_rounding(model: Any, pixel_values: Tensor, stage: EncoderStage) -> bool:
    """Whether other patches are chosen of some image when all that the tower computed moves by `DISTURBANCE`
    of its largest value: rules that choose step by step (VisPruner) carry one tie through all later steps."""
    random = np.random.default_rng(0)
    for view in _views(model, pixel_values):
        _, patches = reduce(stage, view)
        for _ in range(TRIES):
            _, others = reduce(stage, _disturbed(view, random))
            if patches.tolist() != others.tolist():
                return True
    return False


def _views(model: Any, pixel_values: Tensor) -> Iterator[View]:
    """What the tower computes for each image."""
    tower, wanted = model.model.vision_tower, model.config.vision_feature_layer
    wanted = [wanted] if isinstance(wanted, int) else list(wanted)
    with _eager(tower), _projections(tower) as projections:
        seen = tower(pixel_values, output_attentions=True, output_hidden_states=True)
    for image in range(len(pixel_values)):
        yield View(
            attentions=[_numpy(layer[image]) for layer in seen.attentions],
            states=[_numpy(state[image]) for state in seen.hidden_states],
            queries=[_numpy(layer[image]) for layer in projections["q_proj"]],
            keys=[_numpy(layer[image]) for layer in projections["k_proj"]],
            features=_numpy(torch.cat([seen.hidden_states[n][image] for n in wanted], dim=-1)),
        )


def _disturbed(view: View, random: np.random.Generator) -> View:
    """The same with Gaussian noise on every array."""

    def noisy(array: np.ndarray) -> np.ndarray:
        noise = random.normal(0.0, DISTURBANCE * np.abs(array).max(), array.shape)
        return (array + noise).astype(array.dtype)

    return View(
        attentions=[noisy(each) for each in view.attentions],
        states=[noisy(each) for each in view.states],
        queries=[noisy(each) for each in view.queries],
        keys=[noisy(each) for each in view.keys],
        features=view.features,
    )


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
