"""LightCompress (llmc): the token-reduction part of its YAML configurations.

The method and its settings lie under `sparse.special`, under `sparse.vision.special` (methods that act before
the language model), or under `quant.token_reduction`. `rate` and `prune_ratio` are shares that are *removed*;
ratios of PyramidDrop are shares that stay. Budgets are rounded as LightCompress rounds them. Sections about
data, evaluation and saving have no bearing on pruning; quantization is not imported.
"""

from __future__ import annotations

from collections.abc import Callable

import yaml

from trimvlm.encoder_rules import EncoderStage, VisionZip, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, Select
from trimvlm.rules import LastRowAttention, RandomOrder, TextAttention
from trimvlm_calib.imports import Keys, Target

FORMAT = "lightcompress"
SUMMARY = "YAML of LightCompress (llmc): FastV, PyramidDrop, SparseVLM, VisPruner, VisionZip and others"

HARNESS = ("base", "model", "calib", "eval", "save")
# Tokens that SparseVLM keeps after layers 2, 6 and 15, by the number that names them.
SPARSEVLM_STAGES = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}


def read(text: str, model: Target) -> tuple[Method, Decisions]:
    """Maps the token-reduction section.

    Raises:
        UserError: not YAML, no token reduction in it, a method without a counterpart, or a key that cannot be
            mapped.
    """
    try:
        config = Keys(yaml.safe_load(text), "")
    except yaml.YAMLError as error:
        raise UserError(f"not YAML: {' '.join(str(error).split())}") from None
    config.ignore(*HARNESS)
    base = config.take("base", dict, {})
    name, special = _section(config)
    if name not in METHODS:
        raise UserError(
            f"{special.where('method')}: {name!r} has no counterpart; imported are {', '.join(METHODS)}"
        )
    ours, mapping = METHODS[name]
    decisions = mapping(special, model, int(base.get("seed", 0)))
    special.finish()
    config.finish()
    return Method(name=ours, parameters=special.rest()), decisions


def _section(config: Keys) -> tuple[str, Keys]:
    """The reduction's name, and its settings."""
    quant = config.take("quant", dict, {})
    if "token_reduction" in quant:
        section = Keys(quant["token_reduction"], "quant.token_reduction")
        name, special = section.take("method", str), section.take("special", dict, {})
        section.finish()
        return name, Keys(special, "quant.token_reduction.special")
    if quant:
        raise UserError("quant: no token_reduction in it; quantization is not imported")
    sparse, path = Keys(config.take("sparse", dict), "sparse"), "sparse"
    if vision := sparse.take("vision", dict, {}):
        sparse.finish()
        sparse, path = Keys(vision, "sparse.vision"), "sparse.vision"
    method = sparse.take("method", str)
    if method != "TokenReduction":
        raise UserError(
            f"{path}.method: {method!r} is not TokenReduction; trimvlm calibrate measures layers and weights"
        )
    special = Keys(sparse.take("special", dict), f"{path}.special")
    sparse.finish()
    return special.take("method", str), special


def _kept(special: Keys, key: str, model: Target) -> int:
    """Tokens that stay, of a share that is removed."""
    rate = special.take(key, float)
    if not 0 <= rate < 1:
        raise UserError(f"{special.where(key)}: {rate} is not within 0 and 1 (excluded)")
    return round(model.spec.visual_tokens * (1 - rate))


def _fastv(special: Keys, model: Target, seed: int) -> Decisions:
    layer, rule = special.take("pruning_loc", int), LastRowAttention(attention="previous")
    return Decisions(select=(Select(layer=layer, keep=_kept(special, "rate", model), by=rule),))


def _random(special: Keys, model: Target, seed: int) -> Decisions:
    """Drawn anew for every image there, once here."""
    layer = special.take("pruning_loc", int)
    return Decisions(
        select=(Select(layer=layer, keep=_kept(special, "rate", model), by=RandomOrder(seed=seed)),)
    )


def _pyramiddrop(special: Keys, model: Target, seed: int) -> Decisions:
    layers, ratios = special.take("layer_list", list), special.take("image_token_ratio_list", list)
    if len(layers) != len(ratios) or not layers:
        raise UserError(
            f"{special.where('image_token_ratio_list')}: {len(ratios)} ratios for {len(layers)} layers"
        )
    selects = tuple(
        Select(layer=layer, keep=int(model.spec.visual_tokens * ratio), by=LastRowAttention(attention="own"))
        for layer, ratio in zip(layers, ratios, strict=True)
    )
    return Decisions(select=selects, positions="compact")


def _sparsevlm(special: Keys, model: Target, seed: int) -> Decisions:
    """It selects after the layers that it names."""
    layers = special.take("pruning_loc", list, [2, 6, 15])
    tokens = special.take("retained_tokens", int, 192)
    special.ignore("init_token_total_shape")  # the length of its prompt
    if special.take("merge_flag", bool, True):
        raise UserError(
            f"{special.where('merge_flag')}: merged rows inside the decoder cannot be said in a profile; "
            "set merge_flag: False"
        )
    if not special.take("prune_flag", bool, True):
        raise UserError(f"{special.where('prune_flag')}: without pruning nothing is left to do")
    if tokens not in SPARSEVLM_STAGES:
        raise UserError(
            f"{special.where('retained_tokens')}: {tokens} is not one of "
            f"{', '.join(map(str, SPARSEVLM_STAGES))}"
        )
    if len(layers) not in (1, 3):
        raise UserError(
            f"{special.where('pruning_loc')}: {layers}: budgets are known for one layer and for three"
        )
    keeps = SPARSEVLM_STAGES[tokens] if len(layers) == 3 else (tokens,)
    return Decisions(
        select=tuple(
            Select(layer=layer + 1, keep=keep, by=TextAttention())
            for layer, keep in zip(layers, keeps, strict=True)
        )
    )


def _vispruner(special: Keys, model: Target, seed: int) -> Decisions:
    keep = _kept(special, "prune_ratio", model)
    return _by_attention(model, keep, special.take("important_ratio", float))


def _fastervlm(special: Keys, model: Target, seed: int) -> Decisions:
    """The most attended patches: VisPruner without diverse ones."""
    return _by_attention(model, _kept(special, "rate", model), 1.0)


def _by_attention(model: Target, keep: int, important: float) -> Decisions:
    features = model.tower.features[-1]
    rule = VisPruner(important=important, attention=features - 1, features=features)
    return Decisions(encoder=EncoderStage(keep=keep, by=rule))


def _visionzip(special: Keys, model: Target, seed: int) -> Decisions:
    """[CLS] comes on top of the dominant patches."""
    dominant, contextual = special.take("dominant", int, 192), special.take("contextual", int, 30)
    layer = model.tower.features[-1] - 1
    rule = VisionZip(contextual=contextual, attention=layer, keys=layer)
    return Decisions(encoder=EncoderStage(keep=dominant + 1 + contextual, by=rule))


METHODS: dict[str, tuple[str, Callable[[Keys, Target, int], Decisions]]] = {
    "FastV": ("fastv", _fastv),
    "PyramidDrop": ("pyramiddrop", _pyramiddrop),
    "SparseVLM": ("sparsevlm", _sparsevlm),
    "VisPruner": ("vispruner", _vispruner),
    "VisionZip": ("visionzip", _visionzip),
    "FasterVLM": ("fastervlm", _fastervlm),
    "RandomPrune": ("random-select", _random),
}
