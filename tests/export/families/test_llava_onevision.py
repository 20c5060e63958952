"""LLaVA-OneVision: tiles, unpadding, thinning out and newlines as transformers has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_checks import TOLERANCE, Family, external, picture, rewrite, run, shards
from tiny_tiled import tiny_onevision
from transformers import AutoImageProcessor

from trimvlm.encoder_rules import EncoderStage, HiPrune, VisionTaps, VisPruner, check_tower
from trimvlm.errors import UserError
from trimvlm_export.families import llava_onevision
from trimvlm_export.reference_encoder import reduced_features

# (height, width) of an image, and its grid: 3 x 3 tokens a view of 29 pixels, at most 4 views' worth.
GRIDS = {
    (29, 29): (3, 3),  # one tile beside the whole image
    (20, 200): (1, 12),  # rows of padding cut off
    (58, 24): (6, 3),
    (58, 12): (6, 1),  # columns
    (40, 48): (6, 6),
    (59, 68): (5, 6),  # 3 x 3 tiles, 7 x 9 tokens, thinned out
    (38, 89): (4, 8),
    (89, 38): (8, 4),
}


@pytest.fixture(scope="module")
def onevision(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tiny_onevision(tmp_path_factory.mktemp("onevision") / "model"))


@pytest.mark.parametrize("size", GRIDS)
def test_module_equals_transformers(onevision: Family, size: tuple[int, int]) -> None:
    inputs, grid = onevision.inputs(size), GRIDS[size]
    expected, (pixels,) = onevision.features(inputs), inputs["pixel_values"]
    with torch.no_grad():
        (visual,) = onevision.module(grid)(pixels)
    spec = llava_onevision.model_spec(onevision.config, "print", grid)
    assert llava_onevision.pixel_values(onevision.config, grid) == list(pixels.shape)
    assert spec.visual_tokens == len(expected) == 9 + grid[0] * (grid[1] + 1)
    assert (spec.family, spec.grid) == ("llava_onevision", grid)
    np.testing.assert_allclose(visual, expected, atol=TOLERANCE)


def test_graph_that_thins_out_equals_transformers(onevision: Family) -> None:
    inputs = onevision.inputs((59, 68))
    graph = onevision.graph((5, 6))
    visual = run(graph, pixel_values=inputs["pixel_values"][0])["visual"]
    np.testing.assert_allclose(visual, onevision.features(inputs), atol=TOLERANCE)
    assert graph.stat().st_size < 50_000
    assert {"newline", "tower.embeddings.position_embedding.weight"} <= set(external(graph))


def test_of_several_ways_to_a_grid_it_means_the_one_with_fewest_tiles(onevision: Family) -> None:
    """64 x 64 pixels come to 6 x 6 tokens, too: 3 x 3 tiles, thinned out."""
    inputs = onevision.inputs((64, 64))
    assert len(inputs["pixel_values"][0]) == 10 and len(onevision.features(inputs)) == 9 + 6 * 7
    found = llava_onevision.layout(onevision.config, (6, 6))
    assert (found.tiles, found.covered, found.thinned, found.views) == ((2, 2), (6, 6), False, 5)


def test_several_images_in_a_prompt_are_one_view_each(onevision: Family) -> None:
    """And end in one newline each; the reference sees them so, too."""
    processor = AutoImageProcessor.from_pretrained(onevision.checkpoint)
    pictures = [picture((40, 48), 1), picture((20, 90), 2)]
    inputs = dict(processor(images=[pictures], return_tensors="pt"))
    assert inputs["batch_num_images"].tolist() == [2]
    expected = onevision.features(inputs, batch_num_images=inputs["batch_num_images"])
    module = onevision.module(None)
    with torch.no_grad():
        visual = torch.cat([module(pixels[:1])[0] for pixels in inputs["pixel_values"]])
    spec = llava_onevision.model_spec(onevision.config, None, None)
    assert (spec.visual_tokens, spec.grid) == (10, None) and len(expected) == 20
    np.testing.assert_allclose(visual, expected, atol=TOLERANCE)
    every = EncoderStage(keep=9, by=HiPrune(object_layer=0, deep_layer=1))
    rows, _ = reduced_features(onevision.model, inputs, every)
    np.testing.assert_allclose(rows, expected.unflatten(0, (2, 10))[:, :9].flatten(0, 1), atol=TOLERANCE)


def test_encoder_stage_equals_reference(onevision: Family) -> None:
    stage = EncoderStage(keep=35, by=VisPruner(attention=2, received=True, features=2))
    grid = (6, 6)
    check_tower(stage, llava_onevision.tower(onevision.config, grid), 9 + 6 * 7)
    first, second = onevision.check_stage(grid, onevision.inputs((40, 48), (58, 58)), stage)
    assert [sum(n // 9 == view for n in first) for view in range(5)] == [7] * 5 and first != second


def test_taps_equal_transformers(onevision: Family) -> None:
    wanted = VisionTaps(received_attention=(0, 2), keys=(1,), features=(1, 3))
    pixels, grid = onevision.inputs((40, 48))["pixel_values"][0], (6, 6)
    with torch.no_grad():
        tower, *found = onevision.module(grid, wanted)(pixels)
        siglip = onevision.model.model.vision_tower
        siglip.set_attn_implementation("eager")
        seen = siglip(pixels, output_attentions=True, output_hidden_states=True)
        siglip.set_attn_implementation("sdpa")
        layer = siglip.encoder.layers[1]
        keys = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[1]))
    received = [seen.attentions[n].mean(dim=(1, 2)) for n in (0, 2)]
    expected = [*received, keys.unflatten(-1, (2, 16)), seen.hidden_states[1], seen.hidden_states[3]]
    np.testing.assert_allclose(tower, seen.hidden_states[-1], atol=TOLERANCE)
    for name, ours, theirs in zip(wanted.names, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=name)
    with pytest.raises(UserError, match=r"\[CLS\], which this tower does not have; set received: true"):
        by_cls = EncoderStage(keep=35, by=VisPruner(attention=2, features=2))
        check_tower(by_cls, llava_onevision.tower(onevision.config, grid), 51)


@pytest.mark.parametrize("old_names", [True, False])
def test_every_tensor_of_a_sharded_checkpoint_has_its_place(tmp_path: Path, old_names: bool) -> None:
    checkpoint = tiny_onevision(tmp_path / "model", shard="200KB", old_names=old_names, tie=True)
    assert shards(checkpoint) > 2
    ignored = Family(checkpoint).ignored((3, 3))
    prefix = "" if old_names else "model."
    assert set(ignored) == {f"{prefix}vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}
    assert "final norm" in next(iter(ignored.values()))


def test_published_names(onevision: Family, tmp_path: Path) -> None:
    """As the files on the Hub name them, from before transformers 4.52; some have the pooling head."""

    def published(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("vision_tower.", "vision_tower.vision_model."), tensor

    old = Family(rewrite(onevision.checkpoint, tmp_path / "model", published))
    pixels = onevision.inputs((29, 29))["pixel_values"][0]
    with torch.no_grad():
        torch.testing.assert_close(old.module((3, 3))(pixels), onevision.module((3, 3))(pixels))
    assert len(old.ignored((3, 3))) == 2
    head = llava_onevision.canonical("vision_tower.vision_model.head.probe")
    assert "pooling head" in (llava_onevision.unused(old.config, head) or "")


def test_half_precision(onevision: Family) -> None:
    """The graph computes in float16; against float32 it is off by roundings, not more."""
    half = Family(onevision.checkpoint, "float16")
    inputs = onevision.inputs((59, 68))
    with torch.no_grad():
        (visual,) = half.module((5, 6))(inputs["pixel_values"][0].half())
    assert visual.dtype == torch.float16
    np.testing.assert_allclose(visual.float(), onevision.features(inputs), atol=0.05)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((12, 12), "no image comes to 12x12 .* 3x3, 3x6, "),  # more than 4 views' worth
        ((6, 2), "no image comes to 6x2"),  # padding is the same on both sides
        ((0, 3), "no image comes to 0x3"),
    ],
)
def test_grids_that_no_image_has(onevision: Family, grid: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llava_onevision.model_spec(onevision.config, None, grid)


@pytest.mark.parametrize(
    ("change", "grid", "message"),
    [
        ({"vision_aspect_ratio": "pad"}, None, "vision_aspect_ratio: 'pad' .* only 'anyres_max_N'"),
        (
            {"vision_feature_select_strategy": "default"},
            None,
            "'default' gives no square .* only 'full'",
        ),
        ({"vision_config": {"model_type": "dinov2"}}, None, "'dinov2' is not supported, only 'clip_vision"),
        ({"image_grid_pinpoints": [[29, 30]]}, (3, 3), "29x30 pixels are no whole views of 29x29"),
    ],
)
def test_other_configurations(onevision: Family, change: dict[str, Any], grid: Any, message: str) -> None:
    config = type(onevision.config)(**{**onevision.config.to_dict(), **change})
    with pytest.raises(UserError, match=message):
        llava_onevision.model_spec(config, None, grid)
