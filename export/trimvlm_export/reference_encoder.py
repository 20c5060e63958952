"""The encoder stage in the reference: the untouched tower with its own attention outputs, rules as loops.

Shapes: M images, D model width, K rows kept of one image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from trimvlm.encoder_rules import EncoderStage
from trimvlm_export import families
from trimvlm_export.reference_encoder_rules import View, reduce

TRIES = 8


@torch.no_grad()
def reduced_features(
    model: Any, inputs: Mapping[str, Any] | Tensor, stage: EncoderStage
) -> tuple[Tensor, list[np.ndarray]]:
    """Visual rows of images under an encoder stage, as the decoder gets them.

    Args:
        model: transformers' model of a family that has `reference_views`.
        inputs: what its processor gives: `pixel_values` and what goes with them; or those alone.

    Returns:
        Projector outputs [M * K, D], image by image and view by view, and for each image the visual tokens
        that its rows stem from, int64, in the order of the rows, numbered through its views.
    """
    inputs = _mapping(inputs)
    family = families.of(model.config.model_type)
    rows, chosen = [], []
    for image in family.reference_views(model, inputs):
        per_view, found = _per_view(stage, image.count), []
        for number in range(image.count):
            view = image.see(number)
            features_KE, patches = reduce(per_view, view)
            rows.append(torch.as_tensor(features_KE).to(inputs["pixel_values"]))
            found.append(number * view.patches + patches)
        chosen.append(np.concatenate(found))
    return family.reference_project(model, torch.cat(rows)), chosen


@torch.no_grad()
def hangs_on_rounding(
    model: Any, inputs: Mapping[str, Any] | Tensor, stage: EncoderStage, noise: float
) -> bool:
    """Whether other tokens are chosen of some image when all that the tower computed moves by `noise` of its
    largest value: rules that choose step by step (VisPruner) carry one tie through all later steps."""
    random = np.random.default_rng(0)
    for image in families.of(model.config.model_type).reference_views(model, _mapping(inputs)):
        per_view = _per_view(stage, image.count)
        for number in range(image.count):
            view = image.see(number)
            _, patches = reduce(per_view, view)
            for _ in range(TRIES):
                _, others = reduce(per_view, _disturbed(view, random, noise))
                if patches.tolist() != others.tolist():
                    return True
    return False


def _mapping(inputs: Mapping[str, Any] | Tensor) -> Mapping[str, Any]:
    return {"pixel_values": inputs} if isinstance(inputs, Tensor) else inputs


def _per_view(stage: EncoderStage, views: int) -> EncoderStage:
    """The stage for one of several views, which share its budget equally."""
    assert stage.keep % views == 0, (stage.keep, views)
    return msgspec.structs.replace(stage, keep=stage.keep // views)


def _disturbed(view: View, random: np.random.Generator, share: float) -> View:
    """The same with Gaussian noise on every array that rules read."""

    def noisy(array: np.ndarray) -> np.ndarray:
        noise = random.normal(0.0, share * np.abs(array).max(), array.shape)
        return (array + noise).astype(array.dtype)

    return replace(
        view,
        attentions=[noisy(each) for each in view.attentions],
        states=[noisy(each) for each in view.states],
        queries=[noisy(each) for each in view.queries],
        keys=[noisy(each) for each in view.keys],
    )
