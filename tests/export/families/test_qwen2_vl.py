"""Qwen2-VL and Qwen2.5-VL: vision graphs for one grid against the model that transformers runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_models import noise_image
from tiny_qwen import FAMILIES, tiny_qwen
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageTextToText, Qwen2_5_VLConfig

from trimvlm.encoder_rules import Tower, VisionTaps
from trimvlm.errors import UserError
from trimvlm_export import families
from trimvlm_export.checkpoint import Tensor, model_spec, tower
from trimvlm_export.passes.primitive import OPSET
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save, trace
from trimvlm_export.vision_graph import export_projector, export_tower

LAYERS = 2  # of Qwen2.5-VL the first has windows, the second has not
GRIDS = ((1, 1), (1, 9), (3, 5), (8, 4), (7, 6), (9, 13))  # windows are 4 x 4
UNEVEN = (7, 6)  # windows of four different sizes
WANTED = VisionTaps(received_attention=(0, 1), features=(0, 1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint in a bundle, and the model that transformers makes of it."""

    family: str
    source: Source
    model: Any

    def vision(self, grid: tuple[int, int], wanted: VisionTaps | None) -> nn.Module:
        module = self.source.family.Vision(self.source.config, grid, wanted).requires_grad_(False)
        self.source.load(module, module.parameter_names())
        return module.eval()

    def pixels(self, grid: tuple[int, int]) -> torch.Tensor:
        dims = self.source.family.pixel_values(self.source.config, grid)
        return torch.randn(dims, generator=torch.Generator().manual_seed(grid[0] * 100 + grid[1]))

    @torch.no_grad()
    def features(self, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        sides = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        return torch.cat(self.model.get_image_features(pixels, sides).pooler_output)

    def run(self, file: str, **inputs: torch.Tensor) -> dict[str, np.ndarray]:
        session = onnxruntime.InferenceSession(self.source.out / file, providers=["CPUExecutionProvider"])
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip((each.name for each in session.get_outputs()), found, strict=True))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny_qwen(directory / "checkpoint", request.param, layers=2, vision_layers=LAYERS)
    return Case(
        family=request.param,
        source=Source.place(checkpoint, directory / "bundle", "float32"),
        model=AutoModelForImageTextToText.from_pretrained(checkpoint).eval(),
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_module_gives_what_transformers_gives(case: Case, grid: tuple[int, int]) -> None:
    pixels = case.pixels(grid)
    with torch.no_grad():
        (visual,) = case.vision(grid, None)(pixels)
    torch.testing.assert_close(visual, case.features(pixels, grid), atol=1e-5, rtol=1e-5)
    assert visual.shape == (grid[0] * grid[1], 64)


def test_an_image_of_odd_size(case: Case) -> None:
    processor = AutoImageProcessor.from_pretrained(case.source.out / "checkpoint")
    inputs = processor(noise_image(3, size=(101, 173)), return_tensors="pt")
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    grid = (rows // 2, columns // 2)
    assert grid == (4, 6)
    with torch.no_grad():
        (visual,) = case.vision(grid, None)(inputs["pixel_values"])
    torch.testing.assert_close(visual, case.features(inputs["pixel_values"], grid), atol=1e-5, rtol=1e-5)


def test_the_graph_gives_what_transformers_gives(case: Case) -> None:
    pixels = case.pixels(UNEVEN)
    file = export_tower(case.source, UNEVEN, None)
    found = case.run(file, pixel_values=pixels)
    np.testing.assert_allclose(found["visual"], case.features(pixels, UNEVEN), atol=1e-4)
    _check_operators(case.source.out / file)


@pytest.mark.parametrize("case", ["qwen2_5_vl"], indirect=True)
def test_tower_and_projector_graphs_give_what_transformers_gives(case: Case) -> None:
    pixels = case.pixels(UNEVEN)
    file = export_tower(case.source, UNEVEN, WANTED)
    found = case.run(file, pixel_values=pixels)
    assert list(found) == ["tower", *WANTED.names]
    with torch.no_grad():
        outputs = case.vision(UNEVEN, WANTED)(pixels)
    for name, output in zip(found, outputs, strict=True):
        np.testing.assert_allclose(found[name], output, atol=1e-4, err_msg=name)
    projector = export_projector(case.source, UNEVEN)
    visual = case.run(projector, features=torch.from_numpy(found["tower"][0]))["visual"]
    np.testing.assert_allclose(visual, case.features(pixels, UNEVEN), atol=1e-4)
    _check_operators(case.source.out / file)


def test_the_projector_gives_what_transformers_gives(case: Case) -> None:
    pixels = case.pixels(UNEVEN)
    projector = case.source.family.Projector(case.source.config).requires_grad_(False)
    case.source.load(projector, projector.parameter_names())
    with torch.no_grad():
        (rows,) = case.vision(UNEVEN, VisionTaps())(pixels)
        visual = projector(rows[0])
    torch.testing.assert_close(visual, case.features(pixels, UNEVEN), atol=1e-5, rtol=1e-5)


def _check_operators(file: Path) -> None:
    """Nothing that a backend may not have, and no constants that a larger grid would blow up."""
    model = onnx.load(file, load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert not {kind for kind in kinds if kind in {"Loop", "If", "Scan", "GatherND"} or "Sequence" in kind}
    assert {opset.version for opset in model.opset_import if not opset.domain} == {OPSET}


def test_taps_are_what_transformers_computes(case: Case) -> None:
    pixels, family = case.pixels(UNEVEN), case.source.family
    inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 14, 12]])}
    with torch.no_grad():
        rows, *found = case.vision(UNEVEN, WANTED)(pixels)
        (image,) = family.reference_views(case.model, inputs)
        view = image.see(0)
        visual = family.reference_project(case.model, torch.from_numpy(view.features))
    assert (image.count, view.cls, view.patches, len(view.states)) == (1, False, 42, LAYERS + 1)
    torch.testing.assert_close(visual, case.features(pixels, UNEVEN), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(rows[0], view.features, atol=1e-4)
    named = dict(zip(WANTED.names, found, strict=True))
    for number in WANTED.features:
        expected = [view.state(number, patch) for patch in range(42)]
        np.testing.assert_allclose(named[f"features.{number}"][0], expected, atol=1e-4)
    for layer in WANTED.received_attention:
        expected = view.received(layer)
        np.testing.assert_allclose(named[f"received_attention.{layer}"][0], expected, rtol=1e-4)
        assert max(expected) > 1.5 * min(expected)
        windowed = case.family == "qwen2_5_vl" and layer == 0
        assert (view.attentions[layer] == 0).any() == windowed
    assert [tokens[0] // 4 for tokens in view.tokens.tolist()] == _places(case.family)


def test_the_reference_sees_each_image(case: Case) -> None:
    grids = [(2, 3), (5, 1)]
    pixels = [case.pixels(grid) for grid in grids]
    sides = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
    with torch.no_grad():
        images = case.source.family.reference_views(
            case.model, {"pixel_values": torch.cat(pixels), "image_grid_thw": sides}
        )
        for image, its_pixels, grid in zip(images, pixels, grids, strict=True):
            (rows,) = case.vision(grid, VisionTaps())(its_pixels)
            np.testing.assert_allclose(image.see(0).features, rows[0], atol=1e-4)
    assert case.model.model.visual.config._attn_implementation == "sdpa"


def _places(family: str) -> list[int]:
    """Where each visual token lies in transformers' order: window by window in Qwen2.5-VL."""
    rows, columns = UNEVEN
    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    if family == "qwen2_vl":
        return list(range(len(tokens)))
    order = sorted(tokens, key=lambda token: (token[0] // 4, token[1] // 4, token))
    return [order.index(token) for token in tokens]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tie", "old_names"), [(False, True), (True, True), (True, False)])
def test_every_tensor_is_used(tmp_path: Path, family: str, tie: bool, old_names: bool) -> None:
    checkpoint = tiny_qwen(
        tmp_path / "checkpoint", family, layers=1, vision_layers=1, tie=tie, old_names=old_names, shard="60KB"
    )
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    source = Source.place(checkpoint, tmp_path / "bundle", "float32")
    old = {tensor.name for tensor in source.tensors.tensors.values() if tensor.name.startswith("visual.")}
    assert bool(old) == old_names
    module = source.family.Vision(source.config, (2, 3), None)
    source.load(module, module.parameter_names())
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for name, parameter in model.model.language_model.named_parameters():
        source.tensors.take(source.family.DECODER_PREFIX + name, tuple(parameter.shape))
    if not tie:
        source.tensors.take(source.family.LM_HEAD + "weight", tuple(model.lm_head.weight.shape))
    assert source.ignored() == {}
    assert set(module.parameter_names().values()) > set(
        source.family.Projector(source.config).parameter_names().values()
    )


def test_what_is_not_used_has_a_reason(case: Case) -> None:
    config, unused = case.source.config, case.source.family.unused
    assert unused(config, "lm_head.weight") is None
    assert "follow" in unused(config, "model.visual.rotary_pos_emb.inv_freq")
    assert unused(config, "model.visual.blocks.0.attn.qkv.weight") is None
    assert "tied" in unused(type(config)(tie_word_embeddings=True), "lm_head.weight")


def test_geometry(case: Case) -> None:
    checkpoint = case.source.out / "checkpoint"
    spec = model_spec(checkpoint, (3, 5))
    assert (spec.family, spec.visual_tokens, spec.grid) == (case.family, 15, (3, 5))
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim, spec.mrope) == (2, 4, 2, 16, True)
    assert tower(checkpoint, (3, 5)) == Tower(
        layers=2, patches=15, cls=False, features=(2,), width=128, columns=5
    )


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (None, "no fixed size; give an image size, or a grid"),
        ((0, 4), "0 x 4 visual tokens"),
        ((1, 201), "no side more than 200 times"),
    ],
)
def test_grids_that_cannot_be(case: Case, grid: tuple[int, int] | None, words: str) -> None:
    config, family = case.source.config, case.source.family
    for ask in (
        lambda: family.model_spec(config, None, grid),
        lambda: family.tower(config, grid),
        lambda: family.pixel_values(config, grid),
        lambda: family.Vision(config, grid, None),
    ):
        with pytest.raises(UserError, match=words) as error:
            ask()
        assert "\n" not in str(error.value) and "28" in str(error.value)


def test_graphs_stay_small(tmp_path: Path) -> None:
    """One layer of the real width of Qwen2.5-VL-3B, whose weights are never touched."""
    config = Qwen2_5_VLConfig(vision_config={"depth": 1, "hidden_size": 1280, "out_hidden_size": 2048})
    family = families.of("qwen2_5_vl")
    module, dims = family.Vision(config, (16, 24), None), family.pixel_values(config, (16, 24))
    assert dims == [4 * 16 * 24, 1176]
    for name, parameter in list(module.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        empty = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
        setattr(module.get_submodule(owner), attribute, empty)
    traced = trace(
        module,
        {"pixel_values": torch.empty(dims)},
        lambda name, dimension: False,
        inputs={"pixel_values": dims},
        outputs={"visual": None},
        opset=OPSET,
    )
    weights = {
        name: Tensor(
            name=name,
            file=tmp_path / "weights",
            dtype="float32",
            shape=tuple(parameter.shape),
            offset=0,
            length=4 * parameter.numel(),
        )
        for name, parameter in module.named_parameters()
    }
    attach_weights(traced, weights, tmp_path)
    save(traced, tmp_path / "vision.onnx")
    graph = onnx.load(tmp_path / "vision.onnx", load_external_data=False).graph
    inside = [each for each in graph.initializer if not each.external_data]
    assert "patch_embed.proj.weight" in {each.name for each in graph.initializer if each.external_data}
    assert sum(len(each.raw_data) for each in inside) < 100_000
    assert (tmp_path / "vision.onnx").stat().st_size < 200_000
    # All windows are one batch: 24 of them are not 24 products.
    assert sum(node.op_type == "MatMul" for node in graph.node) == 2
