"""A router with random weights: `random_router(folder, model)`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from trimvlm.profile import ModelSpec
from trimvlm.router_spec import RouterSpec
from trimvlm_export.router import Router, draw_parameters
from trimvlm_export.router_weights import digest, encode


def random_router(folder: Path, model: ModelSpec) -> RouterSpec:
    """A router whose heads are not zero, on disk."""
    spec = RouterSpec(weights="router.safetensors", sha256="", width=32, heads=2, first=2)
    router = Router(spec, model.hidden, model.layers)
    draw_parameters(router, seed=1)
    torch.nn.init.normal_(router.token_head.weight)
    weights = {name: parameter.detach().numpy() for name, parameter in router.named_parameters()}
    (folder / spec.weights).write_bytes(encode(weights))
    return msgspec.structs.replace(spec, sha256=digest(weights))
