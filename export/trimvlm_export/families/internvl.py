"""InternVL2.5 and InternVL3 in Hugging Face's form: InternViT sees tiles and a thumbnail; pixel shuffle makes
one token of each square of patches; MLP projector; Llama or Qwen2.

A grid is the tokens of all tiles; the thumbnail, seen last, is there where there are several. Without a grid
an image is one view, as with one tile. What taps read of a token is the mean over its patches.

Shapes: I views, n x n patches and S tower rows ([CLS] first) of a view, N tokens of one, E tower width, E'
that of a token (its patches beside one another), D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.families import _towers
from trimvlm_export.reference_encoder_rules import View
from trimvlm_export.reference_views import ImageViews, array, arrays, recorded, watch

DECODER_PREFIX = "model.language_model."
LM_HEAD = "lm_head."

canonical = _towers.canonical


def model_spec(config: Any, fingerprint: str | None, grid: Grid | None) -> ModelSpec:
    """Geometry from the configuration.

    Raises:
        UserError: a grid that is no whole tiles, or a tower that this family cannot have.
    """
    found = tower(config, grid)
    return ModelSpec(
        family="internvl",
        fingerprint=fingerprint,
        visual_tokens=found.views * found.patches,
        grid=grid,
        **_towers.decoder_geometry(config.text_config),
    )


def tower(config: Any, grid: Grid | None) -> Tower:
    """The vision tower.

    Raises:
        UserError: a grid that is no whole tiles, a tower of another kind, features that are no square of
            patches, or a square that pixel shuffle cannot divide.
    """
    vision, layer = config.vision_config, config.vision_feature_layer
    if vision.model_type != "internvl_vision":
        raise UserError(
            f"vision_config.model_type: {vision.model_type!r} is not supported, only 'internvl_vision'"
        )
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer: {layer} is not supported, only one layer")
    if config.vision_feature_select_strategy != "default":
        raise UserError(
            f"vision_feature_select_strategy: {config.vision_feature_select_strategy!r} gives no square of "
            "patches, only 'default' does"
        )
    side, block = _sides(config)
    rows, columns = grid or (side, side)
    if rows < 1 or columns < 1 or rows % side or columns % side:
        raise UserError(
            f"grid: {rows}x{columns} visual tokens are no whole tiles; take multiples of {side} both ways"
        )
    tiles = rows * columns // side**2
    return Tower(
        layers=vision.num_hidden_layers,
        patches=side**2,
        cls=False,
        hidden_cls=True,
        features=(layer % (vision.num_hidden_layers + 1),),
        width=vision.hidden_size * block**2,
        views=tiles + (tiles > 1),
    )


def pixel_values(config: Any, grid: Grid | None) -> list[int | str]:
    """Dimensions of the vision graph's input: tiles row by row, then the thumbnail."""
    return [tower(config, grid).views, 3, *config.vision_config.image_size]


def unused(config: Any, name: str) -> str | None:
    """Why a canonical tensor name is not needed, or None if it should have been used."""
    if name == f"{_towers.TOWER}embeddings.mask_token":
        return "only training masks patches"
    return _towers.unused(config, name, tower(config, None))


class Vision(_towers.Views):
    """InternViT up to the last layer that anything needs, pixel shuffle, and without taps the projector.

    Args:
        config: transformers' InternVLConfig.
        grid: as in `ModelSpec`.
        taps: None: what the decoder reads. Otherwise the tokens of each view before the projector, and what
            the taps ask for.
    """

    parts = _towers.Parts(layers="encoder.layer", norm="layernorm_before", attention="attention")

    def __init__(self, config: Any, grid: Grid | None, taps: VisionTaps | None) -> None:
        super().__init__(config, tower(config, grid), taps)
        assert not (self.taps.keys or self.taps.joint_attention), "see trimvlm.encoder_rules.check_tower"
        self.side, self.block = _sides(config)
        # transformers: the last layer's features are those after the final norm, if there is one.
        self.final_norm = config.vision_feature_layer == -1
        self.projector = Projector(config) if taps is None else None

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values [I, 3, H, W] -> visual [I * N, D]; or tower [I, N, E'], then the taps in order:
        attention [I, N], features [I, N, E]."""
        rows, found = self.see(pixel_values)
        rows = self.tower.layernorm(rows) if self.final_norm else rows
        tokens_INE = self._blocks(rows[:, 1:]).flatten(3).flatten(1, 2)
        if self.projector is not None:
            return (self.projector(tokens_INE).flatten(0, 1),)
        patches = {n: rows[:, 1:] if n.startswith("features.") else rows for n, rows in found.items()}
        return (
            tokens_INE,
            *(self._blocks(patches[n]).mean(dim=(3, 4)).flatten(1, 2) for n in self.taps.names),
        )

    def _blocks(self, patches: Tensor) -> Tensor:
        """[I, n * n, ...] -> [I, rows, columns, rows of a block, columns of a block, ...]."""
        split = patches.unflatten(1, (self.side, self.block, self.side, self.block))
        return split.transpose(2, 3)

    def _used(self, name: str) -> bool:
        if name.startswith("layernorm."):
            return self.final_norm
        return name != "embeddings.mask_token" and super()._used(name)

    def _embed(self, pixel_values: Tensor) -> Tensor:
        return self.tower.embeddings(pixel_values)

    def _run(self, layer: Any, hidden: Tensor) -> Tensor:
        return layer(hidden)


class Projector(nn.Module):
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""

    def __init__(self, config: Any) -> None:
        from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector

        super().__init__()
        with torch.device("meta"):
            self.layers = InternVLMultiModalProjector(config)
        _towers.flatten_linears(self)

    def parameter_names(self) -> dict[str, str]:
        """As `Vision.parameter_names`."""
        return {name: _towers.PROJECTOR + name.split(".", 1)[1] for name, _ in self.named_parameters()}

    def forward(self, features: Tensor) -> Tensor:
        """[rows, E'] -> [rows, D], or with more leading dimensions."""
        return self.layers(features)


def reference_views(model: Any, inputs: Mapping[str, Any]) -> Iterator[ImageViews]:
    """For each image its tiles and thumbnail; tokens are numbered as transformers' own pixel shuffle puts
    them."""
    core, ratio, wanted = model.model, model.config.downsample_ratio, model.config.vision_feature_layer
    side = round(_sides(model.config)[0] / ratio)

    def shuffled(patches: Tensor) -> Tensor:
        return core.pixel_shuffle(patches.unflatten(1, (side, side)), scale_factor=ratio).flatten(1, 2)

    def see(pixels: Tensor) -> View:
        layers = [layer.attention for layer in core.vision_tower.encoder.layer]
        with recorded(layers, "q_norm") as queries, recorded(layers, "k_norm") as keys:
            seen = watch(core.vision_tower, pixels)
        last = seen.last_hidden_state if wanted == -1 else seen.hidden_states[wanted]
        return View(
            attentions=arrays(seen.attentions),
            states=arrays(seen.hidden_states),
            queries=arrays(queries),
            keys=arrays(keys),
            features=array(shuffled(last[:, 1:])),
            tokens=array(1 + shuffled(torch.arange(side**2)[None, :, None])).astype(int),
        )

    first = 0
    for count in _views_of_images(model.config, inputs):
        pixels = inputs["pixel_values"][first : first + count]
        yield ImageViews(count, lambda number, pixels=pixels: see(pixels[number]))
        first += count


def reference_project(model: Any, rows: Tensor) -> Tensor:
    """transformers' projector: features [rows, E'] -> visual [rows, D]."""
    return model.model.multi_modal_projector(rows)


def _views_of_images(config: Any, inputs: Mapping[str, Any]) -> list[int]:
    """How many views each image has: by the runs of image tokens, since the processor does not tell."""
    if "input_ids" not in inputs:
        return [len(inputs["pixel_values"])]
    tokens = (inputs["input_ids"][0] == config.image_token_id).int().tolist()
    starts = [n for n, is_image in enumerate(tokens) if is_image and not (n and tokens[n - 1])]
    return [
        sum(tokens[a:b]) // config.image_seq_length for a, b in zip(starts, [*starts[1:], None], strict=True)
    ]


def _sides(config: Any) -> tuple[int, int]:
    """Tokens at each side of a view, and patches at each side of a token.

    Raises:
        UserError: a view that is no square, or that pixel shuffle cannot divide.
    """
    (height, width), (patch, other) = config.vision_config.image_size, config.vision_config.patch_size
    if height != width or patch != other:
        raise UserError(
            f"vision_config: views of {height}x{width} pixels in patches of {patch}x{other}; only squares"
        )
    block = round(1 / config.downsample_ratio)
    if block * config.downsample_ratio != 1 or (height // patch) % block:
        raise UserError(
            f"downsample_ratio: {config.downsample_ratio} does not divide {height // patch} patches a side; "
            "take 1 / K where K divides them"
        )
    return height // patch // block, block
