"""The router of a bundle in torch, for the reference's side of the ladder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trimvlm.bundle import Bundle
from trimvlm.profile import Profile

if TYPE_CHECKING:
    import torch

Score = Callable[[Mapping[str, Any], "torch.Tensor"], np.ndarray]


def make_router(bundle: Bundle, profile: Profile, model: Any) -> Score | None:
    """Resolves a Profile's router into a function; None where it has no router.

    Args:
        bundle: holds the router's weights.
        model: the Hugging Face model, in float32.

    Returns:
        `score(inputs, visual)`: float32 [N] for what the processor gave for a prompt and its visual rows
        [N, D], after the encoder stage where there is one.
    """
    from safetensors.torch import load_file

    from trimvlm_calib.router_training import router_inputs
    from trimvlm_export.reference_rows import cut_images
    from trimvlm_export.router import Router

    spec, encoder = profile.router, profile.decisions.encoder
    if spec is None:
        return None
    router = Router(spec, profile.model.hidden, profile.model.layers).eval().requires_grad_(False)
    router.load_state_dict(load_file(bundle.path(f"{spec.stem}.safetensors")))

    def score(inputs: Mapping[str, Any], visual: torch.Tensor) -> np.ndarray:
        ids = inputs["input_ids"]
        if encoder is not None:
            ids = cut_images(ids, model.config.image_token_id, profile.model.visual_tokens, encoder.keep)
        tokens, _ = router(*router_inputs(model, {"input_ids": ids}, visual))
        return tokens.numpy()

    return score
