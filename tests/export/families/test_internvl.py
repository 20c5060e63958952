"""InternVL: tiles, thumbnail and pixel shuffle as transformers' `get_image_features` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_checks import TOLERANCE, Family, external, run, shards
from tiny_tiled import tiny_internvl
from transformers import AutoConfig

from trimvlm.encoder_rules import EncoderStage, PruMerge, VisionTaps, VisionZip, VisPruner, check_tower
from trimvlm.errors import UserError
from trimvlm_export.families import internvl

# (height, width) of an image, its grid and its views: 3 x 3 tokens a view of 48 pixels, at most 6 tiles.
IMAGES = [((47, 50), (3, 3), 1), ((40, 171), (3, 12), 5), ((200, 101), (6, 3), 3), ((97, 149), (6, 9), 7)]

# The towers of InternVL2.5's small models and of its 26B and 38B ones.
SMALL: dict[str, Any] = {}
LARGE: dict[str, Any] = {"rms_norm": True, "qk_norm": True, "mean_pooling": False, "qwen2": False}


@pytest.fixture(scope="module", params=[SMALL, LARGE], ids=["small", "large"])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tiny_internvl(tmp_path_factory.mktemp("internvl") / "model", **request.param))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tiny_internvl(tmp_path_factory.mktemp("large") / "model", **LARGE))


@pytest.mark.parametrize(("size", "grid", "views"), IMAGES)
def test_module_equals_transformers(
    either: Family, size: tuple[int, int], grid: tuple[int, int], views: int
) -> None:
    inputs = either.inputs(size)
    pixels, expected = inputs["pixel_values"], either.features(inputs)
    with torch.no_grad():
        (visual,) = either.module(grid)(pixels)
    spec = internvl.model_spec(either.config, "print", grid)
    assert internvl.pixel_values(either.config, grid) == list(pixels.shape) == [views, 3, 48, 48]
    assert spec.visual_tokens == len(expected) == 9 * views and (spec.family, spec.grid) == ("internvl", grid)
    np.testing.assert_allclose(visual, expected, atol=TOLERANCE)


@pytest.mark.parametrize("layer", [-2, 3, 1])
def test_other_feature_layers(large: Family, layer: int) -> None:
    """Layer 3 is the last one; named so, transformers leaves the final norm out."""
    config = type(large.config)(**{**large.config.to_dict(), "vision_feature_layer": layer})
    module = internvl.Vision(config, None, None).requires_grad_(False).eval()
    large.source.load(module, module.parameter_names())
    inputs = large.inputs((40, 40))
    with torch.no_grad():
        (visual,) = module(inputs["pixel_values"])
    np.testing.assert_allclose(visual, large.features(inputs, vision_feature_layer=layer), atol=TOLERANCE)
    reason = internvl.unused(config, "model.vision_tower.layernorm.weight")
    assert reason and "final norm" in reason


def test_graph_equals_transformers(large: Family) -> None:
    inputs = large.inputs((200, 101))
    graph = large.graph((6, 3))
    visual = run(graph, pixel_values=inputs["pixel_values"])["visual"]
    np.testing.assert_allclose(visual, large.features(inputs), atol=TOLERANCE)
    assert graph.stat().st_size < 60_000
    assert {"tower.embeddings.position_embeddings", "tower.layernorm.weight"} <= set(external(graph))


def pooled(values: torch.Tensor) -> torch.Tensor:
    """[I, 36, ...] -> [I, 9, ...]: means over squares of 2 x 2 patches, square by square."""
    corners = [12 * row + 2 * column for row in range(3) for column in range(3)]
    return torch.stack([values[:, [n, n + 1, n + 6, n + 7]].mean(dim=1) for n in corners], dim=1)


def test_taps_equal_transformers(large: Family) -> None:
    wanted = VisionTaps(cls_attention=(1,), received_attention=(0, 2), features=(0, 3))
    pixels = large.inputs((200, 101))["pixel_values"]
    with torch.no_grad():
        tower, *found = large.module((6, 3), wanted)(pixels)
        vit = large.model.model.vision_tower
        vit.set_attn_implementation("eager")
        seen = vit(pixels, output_attentions=True, output_hidden_states=True)
        vit.set_attn_implementation("sdpa")
    received = [seen.attentions[n].mean(dim=(1, 2))[:, 1:] for n in (0, 2)]
    expected = [
        pooled(seen.attentions[1][:, :, 0, 1:].mean(dim=1)),
        *map(pooled, received),
        *(pooled(seen.hidden_states[n][:, 1:]) for n in (0, 3)),
    ]
    patches = seen.last_hidden_state[:, 1:]
    np.testing.assert_allclose(tower[:, 5, 32:64], patches[:, 12 + 5], atol=TOLERANCE)
    np.testing.assert_allclose(tower.unflatten(-1, (4, 32)).mean(dim=2), pooled(patches), atol=TOLERANCE)
    for name, ours, theirs in zip(wanted.names, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=name)


def test_encoder_stage_equals_reference(large: Family) -> None:
    """Two images, whose views the reference tells apart by the prompt."""
    stage = EncoderStage(keep=15, by=VisPruner(attention=1, features=2))
    check_tower(stage, internvl.tower(large.config, (6, 3)), 27)
    inputs = large.inputs((200, 101), (150, 77))
    image = [large.config.image_token_id] * 27
    inputs["input_ids"] = torch.tensor([[1, 4, *image, 5, 4, *image, 5, 9]])
    first, second = large.check_stage((6, 3), inputs, stage)
    assert [sum(n // 9 == view for n in first) for view in range(3)] == [5] * 3 and first != second


@pytest.mark.parametrize(
    "by", [VisionZip(contextual=2, attention=1, keys=1), PruMerge(neighbours=2, layer=1)]
)
def test_rules_that_merge_single_patches_are_refused(large: Family, by: Any) -> None:
    with pytest.raises(UserError, match=r"merges single patches .* take msv_prune, vispruner"):
        check_tower(EncoderStage(keep=15, by=by), internvl.tower(large.config, (6, 3)), 27)


@pytest.mark.parametrize("old_names", [True, False])
@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["small", "large"])
def test_every_tensor_of_a_sharded_checkpoint_has_its_place(
    tmp_path: Path, options: dict[str, Any], old_names: bool
) -> None:
    checkpoint = tiny_internvl(tmp_path / "model", shard="200KB", old_names=old_names, tie=True, **options)
    assert shards(checkpoint) > 2
    prefix = "" if old_names else "model."
    assert Family(checkpoint).ignored((3, 6)) == {
        f"{prefix}vision_tower.embeddings.mask_token": "only training masks patches"
    }


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    """Configurations may leave it out, and this family's default says that the head is tied."""
    checkpoint = tiny_internvl(tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (checkpoint / "config.json").write_text(json.dumps(config))
    family = Family(checkpoint)
    assert AutoConfig.from_pretrained(checkpoint).tie_word_embeddings
    head, embeddings = family.model.lm_head.weight, family.model.model.language_model.embed_tokens.weight
    assert not torch.equal(head, embeddings)
    decoder = family.decoder(None)
    assert torch.equal(decoder.lm_head.weight, head) and torch.equal(decoder.embed_tokens.weight, embeddings)


@pytest.mark.parametrize(
    ("change", "grid", "message"),
    [
        ({}, (3, 5), "grid: 3x5 visual tokens are no whole tiles; take multiples of 3 both ways"),
        ({}, (0, 3), "grid: 0x3 visual tokens"),
        ({"vision_feature_layer": [1, 2]}, None, r"vision_feature_layer: \[1, 2\] is not supported"),
        ({"vision_feature_select_strategy": "full"}, None, "'full' gives no square of patches"),
        ({"downsample_ratio": 0.25}, None, "downsample_ratio: 0.25 does not divide 6 patches a side"),
        ({"downsample_ratio": 0.7}, None, "downsample_ratio: 0.7 does not divide"),
        ({"vision_config": {"model_type": "dinov2"}}, None, "'dinov2' is not supported"),
        ({"vision_config": {"image_size": [48, 96]}}, None, "views of 48x96 pixels .* only squares"),
    ],
)
def test_what_is_refused(large: Family, change: dict[str, Any], grid: Any, message: str) -> None:
    config = type(large.config)(**{**large.config.to_dict(), **change})
    with pytest.raises(UserError, match=message):
        internvl.model_spec(config, None, grid)
