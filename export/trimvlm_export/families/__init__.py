"""Model families: one file each, named after transformers' `model_type`. A new family is a new file.

Files with a leading underscore are no families, but what several of them are made of.

A family module gives (`grid` as in `trimvlm.profile.ModelSpec`):

    canonical(name) -> str              checkpoint tensor name to transformers parameter name, old names too
    model_spec(config, fingerprint, grid)     `trimvlm.profile.ModelSpec`
    tower(config, grid)                 `trimvlm.encoder_rules.Tower` of one view
    pixel_values(config, grid)          dimensions of the vision graph's input, "images" where one varies
    Vision(config, grid, taps)          torch module: pixel_values -> visual [N, D] of one image, or
                                        where taps are wanted -> tower [views, S, E'], taps...
    Projector(config)                   torch module: features [rows, E'] -> visual [rows, D]
    unused(config, name) -> str | None  why a checkpoint tensor is not needed
    reference_views(model, inputs)      for each image its `reference_views.ImageViews`: what the untouched
                                        model computes, by code that shares nothing with the module above
    reference_project(model, rows)      its own projector: features [rows, E'] -> visual [rows, D]
    DECODER_PREFIX, LM_HEAD             where the decoder's parameters live
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from trimvlm.errors import UserError


def names() -> list[str]:
    """Families that have a file here."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def of(model_type: str) -> ModuleType:
    """The family module for transformers' `model_type`.

    Raises:
        UserError: a family that trimvlm does not know.
    """
    if model_type not in names():
        raise UserError(f"model_type {model_type!r} is not supported; supported: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{model_type}")
