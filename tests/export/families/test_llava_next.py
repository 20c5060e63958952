"""LLaVA-NeXT: tiles, unpadding and newlines as transformers' `get_image_features` has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_checks import TOLERANCE, Family, external, rewrite, run, shards
from tiny_tiled import tiny_next

from trimvlm.encoder_rules import EncoderStage, MsvPrune, VisionTaps
from trimvlm.errors import UserError
from trimvlm_export.families import llava_next

# (height, width) of an image, and its grid: 4 x 4 tokens a view of 32 pixels.
GRIDS = {
    (40, 48): (6, 8),  # 2 x 2 tiles, rows of padding cut off above and below
    (71, 49): (8, 6),  # columns
    (64, 64): (8, 8),
    (33, 97): (4, 12),  # 1 x 3 tiles
    (20, 200): (2, 12),
    (100, 30): (12, 4),
    (30, 9): (4, 2),  # small and tall: still the first canvas, 1 x 2 tiles
}


@pytest.fixture(scope="module")
def next_(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tiny_next(tmp_path_factory.mktemp("next") / "model"))


@pytest.mark.parametrize("size", GRIDS)
def test_module_equals_transformers(next_: Family, size: tuple[int, int]) -> None:
    inputs, grid = next_.inputs(size), GRIDS[size]
    expected, (pixels,) = next_.features(inputs), inputs["pixel_values"]
    with torch.no_grad():
        (visual,) = next_.module(grid)(pixels)
    spec = llava_next.model_spec(next_.config, "print", grid)
    assert llava_next.pixel_values(next_.config, grid) == list(pixels.shape)
    assert spec.visual_tokens == len(expected) == 16 + grid[0] * (grid[1] + 1)
    assert (spec.family, spec.grid, spec.layers, spec.kv_heads) == ("llava_next", grid, 3, 2)
    np.testing.assert_allclose(visual, expected, atol=TOLERANCE)


def test_graph_equals_transformers(next_: Family) -> None:
    size = (40, 48)
    inputs = next_.inputs(size)
    graph = next_.graph(GRIDS[size])
    visual = run(graph, pixel_values=inputs["pixel_values"][0])["visual"]
    np.testing.assert_allclose(visual, next_.features(inputs), atol=TOLERANCE)
    assert graph.name == "vision-6x8.onnx" and graph.stat().st_size < 50_000
    assert {"newline", "tower.embeddings.position_embedding.weight"} <= set(external(graph))


def test_one_view_alone_ends_in_one_newline(next_: Family) -> None:
    """`get_image_features` always sees tiles; the rule for one view is in `pack_image_features`."""
    pixels = next_.inputs((40, 48))["pixel_values"][0, :1]
    whole = next_.model.model
    with torch.no_grad():
        (visual,) = next_.module(None)(pixels)
        rows = next_.module(None).projector(
            whole.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        )
        (expected,), _ = whole.pack_image_features(
            [rows[:, 1:]], torch.tensor([[40, 48]]), "default", whole.image_newline
        )
    np.testing.assert_allclose(visual, expected, atol=TOLERANCE)
    assert llava_next.model_spec(next_.config, None, None).visual_tokens == 17
    assert llava_next.tower(next_.config, None).views == 1


@pytest.mark.parametrize("size", [(40, 48), (100, 30)])
def test_siglip_and_features_of_several_layers(size: tuple[int, int], tmp_path: Path) -> None:
    siglip = Family(tiny_next(tmp_path / "model", tower="siglip"))
    inputs = siglip.inputs(size)
    with torch.no_grad():
        (visual,) = siglip.module(GRIDS[size])(inputs["pixel_values"][0])
    np.testing.assert_allclose(visual, siglip.features(inputs), atol=TOLERANCE)
    tower = llava_next.tower(siglip.config, GRIDS[size])
    assert (tower.cls, tower.features, tower.width) == (False, (1, 3), 64)


def test_encoder_stage_equals_reference(next_: Family) -> None:
    """Two images, and a batch that is filled up with an empty view; each view keeps its share."""
    stage = EncoderStage(keep=28, by=MsvPrune(attention=1, middle=1, last=3, clusters=2))
    inputs = next_.inputs((20, 200), (22, 190))
    inputs["pixel_values"] = torch.nn.functional.pad(inputs["pixel_values"], (*[0] * 7, 1))
    chosen = next_.check_stage((2, 12), inputs, stage)
    assert [[sum(n // 16 == view for n in each) for view in range(4)] for each in chosen] == [[7] * 4] * 2
    assert chosen[0] != chosen[1]


def test_taps_equal_transformers(next_: Family) -> None:
    wanted = VisionTaps(
        cls_attention=(2,), received_attention=(0,), joint_attention=(1,), keys=(1,), features=(1, 3)
    )
    pixels, grid = next_.inputs((71, 49))["pixel_values"][0], GRIDS[71, 49]
    with torch.no_grad():
        tower, *found = next_.module(grid, wanted)(pixels)
        clip = next_.model.model.vision_tower
        clip.set_attn_implementation("eager")
        seen = clip(pixels, output_attentions=True, output_hidden_states=True)
        layer = clip.encoder.layers[1]
        x = layer.layer_norm1(seen.hidden_states[1])
        query, keys = layer.self_attn.q_proj(x[:, :1]), layer.self_attn.k_proj(x)
        joint = (query @ keys.mT / 32**0.5).softmax(dim=-1)[:, 0, 1:]
        clip.set_attn_implementation("sdpa")
    expected = [
        seen.attentions[2][:, :, 0, 1:].mean(dim=1),
        seen.attentions[0].mean(dim=(1, 2))[:, 1:],
        joint,
        keys.unflatten(-1, (2, 16)),
        seen.hidden_states[1],
        seen.hidden_states[3],
    ]
    np.testing.assert_allclose(tower, seen.hidden_states[-2], atol=TOLERANCE)
    for name, ours, theirs in zip(wanted.names, found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("old_names", [True, False])
def test_every_tensor_of_a_sharded_checkpoint_has_its_place(tmp_path: Path, old_names: bool) -> None:
    checkpoint = tiny_next(tmp_path / "model", shard="200KB", old_names=old_names, tie=True)
    assert shards(checkpoint) > 2
    ignored = Family(checkpoint).ignored((4, 8))
    assert {reason.split(" 2 ")[0] for reason in ignored.values()} == {
        "the projector reads hidden states before the tower's final norm",
        "tower layer",
    }


def test_an_encoder_stage_has_no_newlines(next_: Family, tmp_path: Path) -> None:
    family = Family(next_.checkpoint)
    names = family.module((4, 8), VisionTaps(received_attention=(2,))).parameter_names().values()
    assert "model.image_newline" not in names and not any("multi_modal" in name for name in names)
    reason = llava_next.unused(family.config, "model.image_newline")
    assert reason and "newline" in reason
    assert llava_next.unused(family.config, "model.vision_tower.encoder.layers.0.extra") is None


def test_published_names(next_: Family, tmp_path: Path) -> None:
    """As the files on the Hub name them, from before transformers 4.52."""
    assert llava_next.canonical("image_newline") == "model.image_newline"

    def published(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.replace("vision_tower.", "vision_tower.vision_model."), tensor

    old = Family(rewrite(next_.checkpoint, tmp_path / "model", published))
    pixels = next_.inputs((64, 64))["pixel_values"][0]
    with torch.no_grad():
        torch.testing.assert_close(old.module((8, 8))(pixels), next_.module((8, 8))(pixels))
    assert all(".vision_model." in name for name in old.ignored((8, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, t: None if name == "image_newline" else (name, t), "no tensor for model.image_newline"),
        (
            lambda name, t: (name, t[:2].clone() if "class_emb" in name else t),
            r"is \[2\], the model needs \[32\]",
        ),
        (
            lambda name, t: (name.replace("layers.0.mlp.fc1.bias", "layers.0.mlp.fc3.bias"), t),
            "no tensor for model.vision_tower.encoder.layers.0.mlp.fc1.bias",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(next_: Family, tmp_path: Path, change: object, message: str) -> None:
    broken = Family(rewrite(next_.checkpoint, tmp_path / "model", change))
    with pytest.raises(UserError, match=message):
        broken.module((8, 8))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((16, 16), "no image comes to 16x16 .* 4x8, 4x12, 8x4, 8x8, 12x4"),
        ((8, 7), "no image comes to 8x7"),  # padding is the same on both sides
        ((0, 8), "no image comes to 0x8"),
        ((5, 5), "no image comes to 5x5"),
    ],
)
def test_grids_that_no_image_has(next_: Family, grid: tuple[int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        llava_next.model_spec(next_.config, None, grid)
