"""From the published tensor names to the reference model's parameters: strict, in place, never pickled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from trimvlm.errors import UserError
from trimvlm_export.checkpoint import TensorMap, read_header, weight_files
from trimvlm_export.families._towers import PROJECTOR, TOWER
from trimvlm_export.weights import mapped

# Published names; and of the decoder those that transformers' save_pretrained gives this model.
_RENAMES = (
    (r"^model\.language_model\.model\.", "model."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?", TOWER),
    (r"^model\.mm_projector\.mlp\.mlp\.0\.", PROJECTOR + "linear_1."),
    (r"^model\.mm_projector\.mlp\.mlp\.2\.", PROJECTOR + "linear_2."),
    (r"^model\.mm_projector\.peg\.peg\.0\.", PROJECTOR + "position."),
)


def canonical(name: str) -> str:
    """Parameter name in the reference model for a tensor name in a checkpoint."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def buffer(name: str) -> str | None:
    """Why a canonical name is no parameter, or None for one that is. Old versions saved such tensors."""
    if name.endswith("rotary_emb.inv_freq"):
        return "rotary frequencies follow from the configuration"
    return "positions are counted" if name == TOWER + "embeddings.position_ids" else None


def load(model: Any, directory: Path, dtype: torch.dtype | None) -> None:
    """Gives every parameter its tensor: a view of the file, or in another dtype a copy.

    Args:
        dtype: None: as stored.

    Raises:
        UserError: no safetensors, a tensor that is missing or has another shape, or one left over.
    """
    found = (tensor for file in weight_files(directory) for tensor in read_header(file))
    tensors = TensorMap(found, canonical)
    if not any(name.startswith(TOWER) for name in tensors.tensors):
        raise UserError(
            f"{directory}: the vision tower's weights (model.vision_tower.*) are not in the checkpoint; "
            "MobileVLM-V2 has fine-tuned its own, so save the whole model, tower included"
        )
    taken = {name: tensors.take(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()}
    tied = {"lm_head.weight": "tied to the token embeddings"} if model.config.tie_word_embeddings else {}
    tensors.rest(lambda name: tied.get(name) or buffer(name))
    for name, tensor in taken.items():
        weights = mapped(tensor)
        owner, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(owner),
            last,
            torch.nn.Parameter(weights if dtype is None else weights.to(dtype), requires_grad=False),
        )
    model.tie_weights()
