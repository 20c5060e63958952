"""A router's weights on disk: one safetensors file in float32 beside the Profiles that name it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trimvlm.bundle import sha256
from trimvlm.errors import UserError
from trimvlm.profile import Profile
from trimvlm.rules import RouterScores
from trimvlm_export.checkpoint import Tensor, read_header


def encode(weights: Mapping[str, np.ndarray]) -> bytes:
    """The file's bytes; the same weights give the same bytes."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array, np.float32) for name, array in sorted(weights.items())})


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(encode(weights)).hexdigest()


def find_weights(profile: Profile, directory: Path | None) -> Path | None:
    """The router weights of a Profile; None where it has no router.

    Args:
        directory: where the Profile's file lies; None: unknown.

    Raises:
        UserError: the Profile ranks by a router that it does not name, or the file is missing or another one.
    """
    spec = profile.router
    if spec is None:
        if any(isinstance(select.by, RouterScores) for select in profile.decisions.select):
            raise UserError(
                f"profile {profile.name}: select.by: router needs the profile's router; trimvlm calibrate "
                "--method par trains one"
            )
        return None
    again = "copy it beside the profile, or calibrate again"
    path = (directory or Path()) / spec.weights
    if not path.is_file():
        raise UserError(f"profile {profile.name}: its router weights {path} are missing; {again}")
    if sha256(path) != spec.sha256:
        raise UserError(f"profile {profile.name}: {path} is not its router (SHA-256 differs); {again}")
    return path


def check_tensors(profile: Profile, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Where each tensor of a router lies.

    Args:
        shapes: what the router of this Profile has, see `trimvlm_export.router.parameter_shapes`.

    Raises:
        UserError: another set of tensors, another shape or precision: the router of another model.
    """
    found = {tensor.name: tensor for tensor in read_header(path)}
    for name in sorted({*found, *shapes}):
        have, want = found.get(name), shapes.get(name)
        if have is None or want is None or (have.shape, have.dtype) != (want, "float32"):
            raise UserError(
                f"profile {profile.name}: {path}: {name} is {_said(have)}, this model's router has "
                f"{list(want) if want else 'none'}; it was trained for another model, calibrate again"
            )
    return found


def _said(tensor: Tensor | None) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}" if tensor else "missing"
