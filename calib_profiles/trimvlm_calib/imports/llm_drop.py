"""LLM-Drop ("What Matters in Transformers?"): a model's config.json with the sub-layers that are dropped.

`drop_attn_list` and `drop_mlp_list` hold layer numbers, or one boolean per layer. A layer in both is not
executed at all. All other keys are the model's own configuration; those that give its geometry must agree.
The released code counts a dropped layer's number in the cache as well; that changes no result.
"""

from __future__ import annotations

import json
from typing import Any

from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method
from trimvlm_calib.imports import Target

FORMAT = "llm-drop"
SUMMARY = "config.json of LLM-Drop: drop_attn_list and drop_mlp_list"

GEOMETRY = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "ffn",
}


def read(text: str, model: Target) -> tuple[Method, Decisions]:
    """Maps the two lists.

    Raises:
        UserError: not JSON, another geometry than the model's, a layer that there is not, or nothing dropped.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError("not a config.json: an object is needed")
    for key, field in GEOMETRY.items():
        if (found := config.get(key)) is not None and found != (wanted := getattr(model.spec, field)):
            raise UserError(f"{key}: {found}, but this model has {wanted}; it was made for another model")
    attention = _layers(config, "drop_attn_list", model.spec.layers)
    ffn = _layers(config, "drop_mlp_list", model.spec.layers)
    if not attention | ffn:
        raise UserError("drop_attn_list, drop_mlp_list: both are empty or missing, nothing is dropped")
    rules = (
        LayerRule(layers=tuple(sorted(attention - ffn)), sublayers="ffn"),
        LayerRule(layers=tuple(sorted(ffn - attention)), sublayers="attention"),
        LayerRule(layers=tuple(sorted(attention & ffn)), execute="none"),
    )
    parameters = {"drop_attn_list": sorted(attention), "drop_mlp_list": sorted(ffn)}
    decisions = Decisions(layers=tuple(rule for rule in rules if rule.layers))
    return Method(name="llm-drop", parameters=parameters), decisions


def _layers(config: dict[str, Any], key: str, depth: int) -> set[int]:
    """Layer numbers of one list; a boolean stands for its own place."""
    entries = config.get(key)
    if entries is None:
        return set()
    if not isinstance(entries, list) or not all(isinstance(entry, int) for entry in entries):
        raise UserError(f"{key}: a list of layer numbers or booleans is needed, found {entries!r}")
    layers = {
        place if isinstance(entry, bool) else entry
        for place, entry in enumerate(entries)
        if entry is not False
    }
    for layer in sorted(layers):
        if not 0 <= layer < depth:
            raise UserError(f"{key}: layer {layer} is not within 0..{depth - 1}")
    return layers
