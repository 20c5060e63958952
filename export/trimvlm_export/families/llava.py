"""LLaVA-1.5: CLIP tower with [CLS], MLP projector, Llama-style decoder.

Shapes: I images, S tower rows ([CLS] and N patches), N visual rows of one image, E tower width, D model
width, H tower heads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."
_PROJECTOR = "model.multi_modal_projector."

# Names that transformers has written over the years, in the order of its versions.
_RENAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)


def canonical(name: str) -> str:
    """Parameter name in transformers 5 for a tensor name in a checkpoint."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: a grid, which this family does not have.
    """
    text, patches = config.text_config, tower(config, grid).patches
    return ModelSpec(
        family="llava",
        fingerprint=fingerprint,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        ffn=text.intermediate_size,
        vocab=text.vocab_size,
        visual_tokens=patches + (config.vision_feature_select_strategy == "full"),
    )


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower.

    Raises:
        UserError: a tower of another kind, or a grid, which this family does not have.
    """
    if grid is not None:
        raise UserError("grid: every image is one view of a fixed size in a llava model; leave the grid out")
    vision, wanted = config.vision_config, config.vision_feature_layer
    if vision.model_type != "clip_vision_model":
        raise UserError(
            f"vision_config.model_type: {vision.model_type!r} is not supported, only 'clip_vision_model'"
        )
    states = vision.num_hidden_layers + 1
    features = tuple(n % states for n in ([wanted] if isinstance(wanted, int) else wanted))
    return Tower(
        layers=vision.num_hidden_layers,
        patches=(vision.image_size // vision.patch_size) ** 2,
        cls=True,
        features=features,
        width=vision.hidden_size * len(features),
    )


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input."""
    return ["images", 3, config.vision_config.image_size, config.vision_config.image_size]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    if name.startswith("model.vision_tower.post_layernorm."):
        return "LLaVA takes hidden states before the tower's final norm"
    if match := re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name):
        return f"tower layer {match[1]} comes after the feature layer {config.vision_feature_layer}"
    if name == "lm_head.weight" and config.text_config.tie_word_embeddings:
        return "tied to the token embeddings"
    return (
        "rotary frequencies follow from the configuration" if name.endswith("rotary_emb.inv_freq") else None
    )


class Vision(nn.Module):
    """Vision tower up to the last layer that anything needs: transformers' own modules.

    Args:
        config: transformers' LlavaConfig.
        grid: None.
        taps: None: with the projector, what the decoder reads. Otherwise without it: the tower's rows and
            what the taps ask for, which may be layers after the feature layer.
    """

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        from transformers import AutoModel

        super().__init__()
        config.vision_config._attn_implementation = "sdpa"
        geometry = tower(config, grid)
        self.taps = taps or VisionTaps()
        self.features, self.drop_cls = geometry.features, config.vision_feature_select_strategy == "default"
        attention = ("cls_attention", "received_attention", "joint_attention", "keys")
        self.read = sorted({n for name in attention for n in getattr(self.taps, name)})
        self.depth = max(*self.features, *self.taps.features, 0)  # layers that run in full
        vision = AutoModel.from_config(config.vision_config)
        vision.encoder.layers = vision.encoder.layers[: max([self.depth, *(n + 1 for n in self.read)])]
        self.tower = vision
        self.projector = Projector(config) if taps is None else None
        _flatten(self)

    def parameter_names(self) -> dict[str, str]:
        """From this module's parameter names to transformers' names in the whole model, of what is used."""
        names = {n: f"model.vision_{n}" for n, _ in self.named_parameters() if self._used(n)}
        if self.projector is not None:
            names |= {f"projector.{name}": whole for name, whole in self.projector.parameter_names().items()}
        return names

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [I * N, D]; or tower [I, S, E'], then the taps in order."""
        hidden = self.tower.pre_layrnorm(self._embed(pixel_values))
        states, found = [hidden], {}
        for number, layer in enumerate(self.tower.encoder.layers):
            if number in self.read:
                found |= self._read(number, layer, hidden)
            if number < self.depth:
                hidden = layer(hidden, attention_mask=None)
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden
                states.append(hidden)
        rows = torch.cat([states[n] for n in self.features], dim=-1)
        if self.projector is not None:
            return (self.projector(rows[:, 1:] if self.drop_cls else rows).flatten(0, 1),)
        found |= {f"features.{n}": states[n] for n in self.taps.features}
        return (rows, *(found[name] for name in self.taps.names))

    def _used(self, name: str) -> bool:
        """A parameter of the tower, and one that something reads."""
        if not name.startswith("tower.") or "post_layernorm" in name:
            return False
        match = re.match(r"tower\.encoder\.layers\.(\d+)\.", name)
        number = int(match[1]) if match else -1
        if number < self.depth:
            return True
        taps = self.taps  # of this layer nothing but its attention is read
        weighted = {*taps.cls_attention, *taps.received_attention, *taps.joint_attention}
        return "layer_norm1" in name or "k_proj" in name or ("q_proj" in name and number in weighted)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """[I, S, E]. transformers looks positions up by number, which would be a second copy in the graph."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((cls, patches), dim=1) + embeddings.position_embedding.weight

    def _read(self, number: int, layer: Any, hidden_ISE: Tensor) -> dict[str, Tensor]:
        """What the taps want of one layer's attention; weights in float32."""
        taps, attn, x = self.taps, layer.self_attn, layer.layer_norm1(hidden_ISE)
        keys_ISHC = attn.k_proj(x).unflatten(-1, (attn.num_heads, attn.head_dim))
        found = {f"keys.{number}": keys_ISHC}
        if number in taps.cls_attention:
            query = attn.q_proj(x[:, :1]).unflatten(-1, (attn.num_heads, attn.head_dim))
            found[f"cls_attention.{number}"] = _weights(query, keys_ISHC)[:, :, 0, 1:].mean(dim=1)
        if number in taps.received_attention:
            queries = attn.q_proj(x).unflatten(-1, (attn.num_heads, attn.head_dim))
            found[f"received_attention.{number}"] = _weights(queries, keys_ISHC).mean(dim=(1, 2))[:, 1:]
        if number in taps.joint_attention:
            query, keys = attn.q_proj(x[:, :1]).unsqueeze(2), keys_ISHC.flatten(2).unsqueeze(2)
            found[f"joint_attention.{number}"] = _weights(query, keys)[:, 0, 0, 1:]
        return found


class Projector(nn.Module):
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""

    def __init__(self, config: Any) -> None:
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__()
        self.layers = LlavaMultiModalProjector(config)
        _flatten(self)

    def parameter_names(self) -> dict[str, str]:
        """As `Vision.parameter_names`."""
        return {name: _PROJECTOR + name.split(".", 1)[1] for name, _ in self.named_parameters()}

    def forward(self, features: Tensor) -> Tensor:
        """[rows, E'] -> [rows, D], or with more leading dimensions."""
        return self.layers(features)


def _weights(query_IRHC: Tensor, keys_ISHC: Tensor) -> Tensor:
    """Attention weights float32 [I, H, R, S], scaled by the size of a head."""
    query, keys = query_IRHC.transpose(1, 2).float(), keys_ISHC.transpose(1, 2).float()
    return torch.softmax(query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)


def _flatten(module: nn.Module) -> None:
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = _FlatLinear


class _FlatLinear(nn.Linear):
    """A linear layer on 2-D rows, which exports as Gemm on the weight as it is stored, not transposed."""

    def forward(self, input: Tensor) -> Tensor:
        flat = nn.functional.linear(input.flatten(0, -2), self.weight, self.bias)
        return flat.unflatten(0, input.shape[:-1])
