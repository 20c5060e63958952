"""Vision towers as families use them: layers up to the last one that anything needs, and what taps read.

Shapes: I views, S tower rows ([CLS] where there is one, then N patches), E tower width, E' width that the
projector reads, D model width, H tower heads, C head size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError

TOWER = "model.vision_tower."
PROJECTOR = "model.multi_modal_projector."

# Names that transformers has written over the years, in the order of its versions.
_RENAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^image_newline$", "model.image_newline"),
    (r"^model\.vision_tower\.vision_model\.", TOWER),
)


def canonical(name: str) -> str:
    """Parameter name in transformers 5 for a tensor name in a checkpoint."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def decoder_geometry(text: Any) -> dict[str, Any]:
    """Fields of a `ModelSpec` that follow from the text model's configuration."""
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "ffn": text.intermediate_size,
        "vocab": text.vocab_size,
    }


def geometry(config: Any, kinds: Sequence[str], views: int = 1) -> Tower:
    """A CLIP or SigLIP tower.

    Args:
        kinds: transformers' `model_type` of the towers that the family takes.
        views: that one image is cut into.

    Raises:
        UserError: a tower of another kind.
    """
    vision, wanted = config.vision_config, config.vision_feature_layer
    if vision.model_type not in kinds:
        raise UserError(
            f"vision_config.model_type: {vision.model_type!r} is not supported, only "
            + " and ".join(repr(kind) for kind in kinds)
        )
    states = vision.num_hidden_layers + 1
    features = tuple(n % states for n in ([wanted] if isinstance(wanted, int) else wanted))
    return Tower(
        layers=vision.num_hidden_layers,
        patches=(vision.image_size // vision.patch_size) ** 2,
        cls=vision.model_type == "clip_vision_model",
        features=features,
        width=vision.hidden_size * len(features),
        views=views,
    )


def unused(config: Any, name: str, geometry: Tower) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    if name.startswith((f"{TOWER}post_layernorm.", f"{TOWER}layernorm.")):
        return "the projector reads hidden states before the tower's final norm"
    if name.startswith(f"{TOWER}head."):
        return "the tower's pooling head is not what the projector reads"
    layer = re.match(r"model\.vision_tower\.encoder\.layers?\.(\d+)\.", name)
    if layer and int(layer[1]) >= max(geometry.features):
        return f"tower layer {layer[1]} comes after the feature layer {config.vision_feature_layer}"
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return "tied to the token embeddings"
    return (
        "rotary frequencies follow from the configuration" if name.endswith("rotary_emb.inv_freq") else None
    )


@dataclass(frozen=True)
class Parts:
    """What a tower calls its list of layers, and a layer its first norm and its attention."""

    layers: str = "encoder.layers"
    norm: str = "layer_norm1"
    attention: str = "self_attn"


class Views(nn.Module):
    """transformers' own tower, CLIP or SigLIP, which sees one or more views.

    Its parameters lie on the meta device until the checkpoint's are assigned to them.

    Args:
        config: transformers' configuration of the whole model.
        geometry: its tower.
        taps: None: only what the projector reads is computed, which is up to `geometry.features`.
    """

    parts = Parts()

    def __init__(self, config: Any, geometry: Tower, taps: VisionTaps | None) -> None:
        from transformers import AutoModel

        super().__init__()
        config.vision_config._attn_implementation = "sdpa"
        self.taps, self.features = taps or VisionTaps(), geometry.features
        self.cls = int(geometry.cls or geometry.hidden_cls)  # rows before the patches
        attention = ("cls_attention", "received_attention", "joint_attention", "keys")
        self.read = sorted({n for name in attention for n in getattr(self.taps, name)})
        self.depth = max(*self.features, *self.taps.features, 0)  # layers that run in full
        self.projector: Any = None
        with torch.device("meta"):
            self.tower = AutoModel.from_config(config.vision_config)
        del self._layers()[max([self.depth, *(n + 1 for n in self.read)]) :]
        flatten_linears(self)

    def parameter_names(self) -> dict[str, str]:
        """From this module's parameter names to transformers' names in the whole model, of what is used."""
        names = {
            f"tower.{name}": TOWER + name for name, _ in self.tower.named_parameters() if self._used(name)
        }
        if self.projector is not None:
            names |= {f"projector.{name}": whole for name, whole in self.projector.parameter_names().items()}
        return names

    def see(self, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """pixel_values [I, 3, H, W] -> what the projector reads, [I, S, E'], and the taps by name."""
        hidden = self._embed(pixel_values)
        states, found = [hidden], {}
        for number, layer in enumerate(self._layers()):
            if number in self.read:
                found |= self._read(number, layer, hidden)
            if number < self.depth:
                hidden = self._run(layer, hidden)
                states.append(hidden)
        found |= {f"features.{n}": states[n] for n in self.taps.features}
        return torch.cat([states[n] for n in self.features], dim=-1), found

    def _layers(self) -> Any:
        return self.tower.get_submodule(self.parts.layers)

    def _used(self, name: str) -> bool:
        """Whether something reads a parameter of the tower."""
        match = re.match(rf"{self.parts.layers}\.(\d+)\.", name)
        if match is None:
            return name.startswith(("embeddings.", "pre_layrnorm."))
        number, taps = int(match[1]), self.taps
        if number < self.depth:
            return True
        # Of this layer nothing but its attention is read.
        weighted = {*taps.cls_attention, *taps.received_attention, *taps.joint_attention}
        read = {self.parts.norm, "k_proj", "k_norm", *(("q_proj", "q_norm") if number in weighted else ())}
        return not read.isdisjoint(name.split("."))

    def _embed(self, pixel_values: Tensor) -> Tensor:
        """[I, S, E]. transformers looks positions up by number, which would be a second copy in the graph."""
        embeddings = self.tower.embeddings
        rows = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if self.cls:
            rows = torch.cat((embeddings.class_embedding.expand(rows.shape[0], 1, -1), rows), dim=1)
        rows = rows + embeddings.position_embedding.weight
        return self.tower.pre_layrnorm(rows) if self.cls else rows

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        return layer(hidden, attention_mask=None)

    def _read(self, number: int, layer: Any, hidden_ISE: Tensor) -> dict[str, Tensor]:
        """What the taps want of one layer's attention, for patches; weights in float32."""
        taps, attn = self.taps, getattr(layer, self.parts.attention)
        x = getattr(layer, self.parts.norm)(hidden_ISE)
        keys_ISHC = _heads(attn, "k", x)
        found = {f"keys.{number}": keys_ISHC}
        if number in taps.cls_attention:
            weights_IHS = _weights(_heads(attn, "q", x[:, :1]), keys_ISHC)[:, :, 0]
            found[f"cls_attention.{number}"] = weights_IHS[..., self.cls :].mean(dim=1)
        if number in taps.received_attention:
            weights_IHSS = _weights(_heads(attn, "q", x), keys_ISHC)
            found[f"received_attention.{number}"] = weights_IHSS.mean(dim=(1, 2))[:, self.cls :]
        if number in taps.joint_attention:
            query, keys = (rows.flatten(2).unsqueeze(2) for rows in (_heads(attn, "q", x[:, :1]), keys_ISHC))
            found[f"joint_attention.{number}"] = _weights(query, keys)[:, 0, 0, self.cls :]
        return found


class Projector(nn.Module):
    """transformers' two-layer projector of the LLaVA models: features [rows, E'] -> visual [rows, D]."""

    def __init__(self, config: Any) -> None:
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        super().__init__()
        with torch.device("meta"):
            self.layers = LlavaMultiModalProjector(config)
        flatten_linears(self)

    def parameter_names(self) -> dict[str, str]:
        """As `Views.parameter_names`."""
        return {name: PROJECTOR + name.split(".", 1)[1] for name, _ in self.named_parameters()}

    def forward(self, features: Tensor) -> Tensor:
        """[rows, E'] -> [rows, D], or with more leading dimensions."""
        return self.layers(features)


def flatten_linears(module: nn.Module) -> None:
    """Makes linear layers work on 2-D rows: they export as Gemm on the weight as stored, not transposed."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = _FlatLinear


class _FlatLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        flat = nn.functional.linear(input.flatten(0, -2), self.weight, self.bias)
        return flat.unflatten(0, input.shape[:-1])


def _heads(attn: Any, kind: str, rows_IRE: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") [I, R, H, C]."""
    projected, norm = getattr(attn, f"{kind}_proj")(rows_IRE), getattr(attn, f"{kind}_norm", None)
    return (norm(projected) if norm else projected).unflatten(-1, (attn.num_heads, attn.head_dim))


def _weights(query_IRHC: Tensor, keys_ISHC: Tensor) -> Tensor:
    """Attention weights float32 [I, H, R, S], scaled by the size of a head."""
    query, keys = query_IRHC.transpose(1, 2).float(), keys_ISHC.transpose(1, 2).float()
    return torch.softmax(query @ keys.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
