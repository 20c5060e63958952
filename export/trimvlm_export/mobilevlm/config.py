"""MobileVLM's published `config.json`, in which text and vision keys lie side by side, as a transformers
configuration of text, vision and what joins them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import PurePath
from typing import Any

from transformers import LlamaConfig, LlavaConfig

from trimvlm.errors import UserError

SIDE = 12  # visual tokens of one image each way: the published LDPv2 pools to 12 x 12 whatever comes in

# Text keys that older versions of transformers wrote and newer ones translate.
_OLD_TEXT_KEYS = {"rope_theta", "rope_scaling"}

# The tower whose geometry is known without its own config.json: LlavaConfig's default is that very one.
_KNOWN_TOWER = "clip-vit-large-patch14-336"


class MobileVLMConfig(LlavaConfig):
    """Configuration of MobileVLM-V2.

    Attributes (those of LlavaConfig apart):
        mm_projector_type: `ldpnetv2`.
        mm_vision_tower: name or path of the CLIP tower. Its last part says the geometry, unless the file has
            a `vision_config` as transformers writes it.
        mm_vision_select_layer: hidden state of the tower that the projector reads.
        mm_vision_select_feature: `patch`.
        image_aspect_ratio: `pad` pads images to squares first; `square` and None do not.
        image_token_index: id that stands for a visual token; -1: the first after the vocabulary.

    Raises:
        UserError (on construction): another projector, tower or prompt format than MobileVLM-V2's.
    """

    model_type = "mobilevlm"

    mm_projector_type: str = "ldpnetv2"
    mm_vision_tower: str | None = _KNOWN_TOWER
    mm_hidden_size: int | None = None
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    mm_use_im_start_end: bool = False
    vision_tower_type: str = "clip"
    image_aspect_ratio: str | None = None
    image_token_index: int = -1

    def __post_init__(self, **kwargs: Any) -> None:
        self._only("mm_projector_type", "ldpnetv2")
        self._only("mm_vision_select_feature", "patch")
        self._only("mm_use_im_start_end", False)
        self._only("vision_tower_type", "clip")
        self._only("image_aspect_ratio", "pad", "square", None)
        names = {field.name for field in fields(LlamaConfig)} | _OLD_TEXT_KEYS
        text = {name: kwargs.pop(name) for name in sorted(names & set(kwargs))}
        if self.text_config is None:
            self.text_config = {**text, "tie_word_embeddings": self.tie_word_embeddings}
        if self.vision_config is None and PurePath(self.mm_vision_tower or "").name != _KNOWN_TOWER:
            raise UserError(
                f"mm_vision_tower: the geometry of {self.mm_vision_tower!r} is not known, only that of "
                f"{_KNOWN_TOWER}; add the tower's own config.json to this one as vision_config"
            )
        self.vision_feature_layer = self.mm_vision_select_layer
        self.vision_feature_select_strategy = "default"
        super().__post_init__(**kwargs)
        vision: Any = self.vision_config
        if self.mm_hidden_size not in (None, vision.hidden_size):
            raise UserError(
                f"mm_hidden_size: {self.mm_hidden_size}, but the tower's rows have {vision.hidden_size} "
                "values; correct the one or the other"
            )
        if self.image_token_index == -1:
            self.image_token_index = self.get_text_config().vocab_size
        self.image_seq_length = SIDE**2

    def _only(self, name: str, *allowed: Any) -> None:
        found = getattr(self, name)
        if found not in allowed:
            raise UserError(
                f"{name}: {found!r} is not supported, only {' or '.join(map(repr, allowed))}; "
                "give a checkpoint of MobileVLM-V2 (1.7B or 3B)"
            )


def window(config: Any) -> int:
    """Patches that one visual token covers each way: 2 for 24 x 24 patches.

    Raises:
        UserError: patches that do not divide into 12 x 12 equal windows.
    """
    vision = config.vision_config
    patches = vision.image_size // vision.patch_size
    if not patches or patches % SIDE:
        raise UserError(
            f"vision_config: {patches} x {patches} patches are not a multiple of {SIDE} x {SIDE}, which "
            "LDPv2 pools them to; give a checkpoint of MobileVLM-V2 (24 x 24 patches)"
        )
    return patches // SIDE
