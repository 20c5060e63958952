"""LLaVA-1.5: CLIP tower with [CLS], MLP projector, Llama-style decoder.

Shapes: I images, S tower rows ([CLS] and N patches), N visual rows of one image, E tower width, D model
width, H tower heads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import ModelSpec

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

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


def model_spec(config: Any, fingerprint: str | None) -> ModelSpec:
    """Geometry from the configuration."""
    text, vision = config.text_config, config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
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
    """Vision tower up to the last layer that anything needs, and the projector: transformers' own modules.

    Args:
        config: transformers' LlavaConfig.
        taps: extra outputs; `features` may ask for layers after the feature layer.
    """

    def __init__(self, config: Any, taps: VisionTaps) -> None:
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__()
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise UserError(
                f"vision_config.model_type: {vision.model_type!r} is not supported, only 'clip_vision_model'"
            )
        vision._attn_implementation = "sdpa"
        states = vision.num_hidden_layers + 1
        wanted = config.vision_feature_layer
        self.feature_layers = [n % states for n in ([wanted] if isinstance(wanted, int) else wanted)]
        for name, numbers, count in (
            ("cls_attention", taps.cls_attention, vision.num_hidden_layers),
            ("features", taps.features, states),
        ):
            if bad := [n for n in numbers if not 0 <= n < count]:
                raise UserError(f"vision_taps.{name}: {bad[0]} is not within 0..{count - 1}")
        self.taps, self.drop_cls = taps, config.vision_feature_select_strategy == "default"
        last = max(*self.feature_layers, *taps.features, *(n + 1 for n in taps.cls_attention), 0)
        tower = AutoModel.from_config(vision)
        tower.encoder.layers = tower.encoder.layers[:last]
        self.tower, self.projector = tower, LlavaMultiModalProjector(config)
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = _FlatLinear

    def parameter_names(self) -> dict[str, str]:
        """From this module's parameter names to transformers' names in the whole model."""
        rename = {"tower": "model.vision_tower", "projector": "model.multi_modal_projector"}
        names = (name for name, _ in self.named_parameters() if "post_layernorm" not in name)
        return {name: f"{rename[name.split('.')[0]]}.{name.split('.', 1)[1]}" for name in names}

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [I * N, D], then the taps: [I, N] each, then [I, S, E] each."""
        hidden = self.tower.pre_layrnorm(self._embed(pixel_values))
        states, attentions = [hidden], {}
        for number, layer in enumerate(self.tower.encoder.layers):
            if number in self.taps.cls_attention:
                attentions[number] = _cls_attention(layer, hidden)
            hidden = layer(hidden, attention_mask=None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            states.append(hidden)
        start = 1 if self.drop_cls else 0
        features = torch.cat([states[n][:, start:] for n in self.feature_layers], dim=-1)
        visual = self.projector(features).flatten(0, 1)
        taps = [attentions[n] for n in self.taps.cls_attention] + [states[n] for n in self.taps.features]
        return (visual, *taps)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """[I, S, E]. transformers looks positions up by number, which would be a second copy in the graph."""
        embeddings = self.tower.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = embeddings.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((cls, patches), dim=1) + embeddings.position_embedding.weight


def _cls_attention(layer: Any, hidden_ISE: Tensor) -> Tensor:
    """[I, N]: softmax attention of the [CLS] row to the patches, mean over heads, in float32."""
    attn, x = layer.self_attn, layer.layer_norm1(hidden_ISE)
    heads = (-1, attn.num_heads, attn.head_dim)
    query = attn.q_proj(x[:, :1]).unflatten(-1, heads[1:]).transpose(1, 2).float()
    keys = attn.k_proj(x).unflatten(-1, heads[1:]).transpose(1, 2).float()
    weights = torch.softmax(query @ keys.transpose(2, 3) * attn.scale, dim=-1)
    return weights[:, :, 0, 1:].mean(dim=1)


class _FlatLinear(nn.Linear):
    """A linear layer on 2-D rows, which exports as Gemm on the weight as it is stored, not transposed."""

    def forward(self, input: Tensor) -> Tensor:
        flat = nn.functional.linear(input.flatten(0, -2), self.weight, self.bias)
        return flat.unflatten(0, input.shape[:-1])
