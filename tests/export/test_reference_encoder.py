"""The encoder stage end to end: exported tower, numpy selection and projector against the reference.

Every rule on one tower graph with all taps; two profiles as whole bundles.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tiny_models import noise_image, tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.backends import Backend, load_backend
from trimvlm.bundle import Bundle
from trimvlm.encoder import make_encoder
from trimvlm.encoder_rules import (
    EncoderStage,
    HiPrune,
    MsvPrune,
    PruMerge,
    Tower,
    VisionTaps,
    VisionZip,
    VisPruner,
    check_tower,
    taps,
)
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method, Profile
from trimvlm.rules import RandomOrder
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm.timings import Timings
from trimvlm.vision import make_vision
from trimvlm_export import reference_encoder
from trimvlm_export.checkpoint import model_spec, tower
from trimvlm_export.export import export
from trimvlm_export.families import llava
from trimvlm_export.reference import Reference
from trimvlm_export.reference_encoder import reduced_features
from trimvlm_export.source import Source
from trimvlm_export.vision_graph import export_projector, export_tower

DEPTH, PATCHES = 3, 36  # hidden state 2 feeds the projector; layer 2 is there for rules that read it

STAGES = {
    "msv-prune": EncoderStage(keep=20, by=MsvPrune(attention=1, middle=1, last=3)),
    "msv-received": EncoderStage(keep=12, by=MsvPrune(attention=2, received=True, middle=1, last=2)),
    "vispruner": EncoderStage(keep=13, by=VisPruner(attention=1, features=2)),
    "visionzip": EncoderStage(keep=12, by=VisionZip(contextual=4, attention=1, keys=1)),
    "hiprune": EncoderStage(keep=14, by=HiPrune(alpha=0.5, object_layer=0, deep_layer=1)),
    "prumerge": EncoderStage(keep=9, by=PruMerge(neighbours=5, layer=2)),
    "random": EncoderStage(keep=7, by=RandomOrder(seed=3)),
}


def union() -> VisionTaps:
    """What all the rules read together."""
    wanted = [taps(stage.by) for stage in STAGES.values()]
    return VisionTaps(
        **{
            field: tuple(sorted({n for each in wanted for n in getattr(each, field)}))
            for field in VisionTaps.__struct_fields__
        }
    )


# What the decoder does on top: a layer that visual rows do not query in, and one without them.
DECODER = {"msv-prune": {"exit": 1, "layers": (LayerRule(layers=(0,), query="none"),)}}


def profile_of(checkpoint: Path, name: str, stage: EncoderStage) -> Profile:
    return Profile(
        name=name,
        method=Method(name=name),
        model=model_spec(checkpoint),
        decisions=Decisions(encoder=stage, **DECODER.get(name, {})),
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "model"
    return tiny_llava(path, layers=2, vision_layers=DEPTH, image_size=48)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def vision(checkpoint: Path) -> Iterator[Backend]:
    """Tower with the union of all taps, and projector."""
    out = checkpoint.parent / "vision"
    out.mkdir()
    source = Source.place(checkpoint, out, "float32")
    files = {
        "vision": out / export_tower(source, None, union()),
        "projector": out / export_projector(source, None),
    }
    with load_backend("onnxruntime", files, {"threads": 1}) as backend:
        yield backend


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    out = checkpoint.parent / "bundle"
    for name in ("msv-prune", "prumerge"):
        export(checkpoint, profile_of(checkpoint, name, STAGES[name]), out)
    return Bundle(out)


@pytest.mark.parametrize("name", STAGES)
def test_rules_equal_reference(vision: Backend, checkpoint: Path, model: Any, name: str) -> None:
    stage = STAGES[name]
    pixels = torch.cat([tiny_inputs(checkpoint, images=3, seed=seed)["pixel_values"] for seed in range(3)])
    expected, patches = reduced_features(model, pixels, stage)
    see, timings = make_vision(vision, 64, make_encoder(stage, PATCHES), PATCHES), Timings()
    found = see(list(pixels.numpy()[:, None]), timings)
    assert expected.shape == found.rows.shape == (len(pixels) * stage.keep, 64)
    np.testing.assert_allclose(found.rows, expected, atol=1e-4)
    assert [chosen.tolist() for chosen in found.chosen] == [chosen.tolist() for chosen in patches]
    assert timings.select and timings.vision
    if name != "random":
        assert len({tuple(chosen) for chosen in patches}) > 1, "another image, other patches"


def test_taps_equal_transformers(vision: Backend, checkpoint: Path, model: Any) -> None:
    pixels = tiny_inputs(checkpoint, images=2)["pixel_values"]
    names = list(vision.outputs("vision"))
    assert names == ["tower", *union().names]
    found = vision.run("vision", {"pixel_values": pixels.numpy()}, names)
    clip = model.model.vision_tower
    clip.set_attn_implementation("eager")
    with torch.no_grad():
        out = clip(pixels, output_attentions=True, output_hidden_states=True)
        expected = {"tower": out.hidden_states[-2]}
        for number, (layer, attention) in enumerate(zip(clip.encoder.layers, out.attentions, strict=True)):
            x = layer.layer_norm1(out.hidden_states[number])
            keys = layer.self_attn.k_proj(x)
            joint = layer.self_attn.q_proj(x) @ keys.transpose(1, 2) / x.shape[-1] ** 0.5
            expected[f"cls_attention.{number}"] = attention[:, :, 0, 1:].mean(dim=1)
            expected[f"received_attention.{number}"] = attention.mean(dim=(1, 2))[:, 1:]
            expected[f"joint_attention.{number}"] = joint.softmax(dim=-1)[:, 0, 1:]
            expected[f"keys.{number}"] = keys.unflatten(-1, (2, -1))
            expected[f"features.{number + 1}"] = out.hidden_states[number + 1]
    for output in names:
        assert found[output].dtype == np.float32
        np.testing.assert_allclose(found[output], expected[output], atol=1e-4, err_msg=output)


def test_reference_leaves_the_model_as_it_was(checkpoint: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    clip: Any = model.model.vision_tower
    before = clip.config._attn_implementation
    pixels = tiny_inputs(checkpoint)["pixel_values"]
    rows, chosen = reduced_features(model, pixels, EncoderStage(keep=PATCHES, by=RandomOrder()))
    assert chosen[0].tolist() == list(range(PATCHES))
    with torch.no_grad():
        dense = model.model.get_image_features(pixels).pooler_output
    np.testing.assert_allclose(rows, dense[0], atol=1e-5)
    assert clip.config._attn_implementation == before == "sdpa"
    hooked = [name for name, part in clip.named_modules() if "_proj" in name and part._forward_hooks]
    assert hooked == []


@pytest.mark.parametrize("name", ["msv-prune", "prumerge"])
def test_session_equals_reference(bundle: Bundle, checkpoint: Path, model: Any, name: str) -> None:
    pixels = tiny_inputs(checkpoint, images=2, seed=5)["pixel_values"]
    expected, patches = reduced_features(model, pixels, STAGES[name])
    schedule = Schedule.resolve(bundle.profile(name), bundle.manifest.profiles[name].model)
    with Reference(model, schedule, STAGES[name]) as reference, Session.open(bundle, name) as session:
        arrays = list(pixels.numpy()[:, None])
        found = session.visual(arrays)
        np.testing.assert_array_equal(session.vision(arrays), found.rows)
        outputs = session.prefill(session.prompt("what is the color of w3 ?", 2), found.rows)
        wanted = reference.prefill(tiny_inputs(checkpoint, images=2, seed=5))
        np.testing.assert_allclose(outputs["logits"][0], wanted.logits, atol=1e-4)
        outputs = session.step(7, outputs)
        np.testing.assert_allclose(outputs["logits"][0], reference.step(7), atol=1e-4)
    np.testing.assert_allclose(found.rows, expected, atol=1e-4)
    assert [chosen.tolist() for chosen in found.chosen] == [chosen.tolist() for chosen in patches]


def test_profiles_share_projector_and_weights(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert {entry.projector for entry in manifest.profiles.values()} == {"projector.onnx"}
    assert {entry.vision for entry in manifest.profiles.values()} == {
        "vision-tower-cls1-features1-features3.onnx",
        "vision-tower-joint2-keys2.onnx",
    }
    assert manifest.profiles[min(manifest.profiles)].tower == Tower(
        layers=DEPTH, patches=PATCHES, cls=True, features=(2,), width=32
    )
    assert len(manifest.weights) == 1
    weights = manifest.files[manifest.weights[0]].bytes
    total = sum(file.stat().st_size for file in bundle.directory.rglob("*") if file.is_file())
    assert total - weights < 600_000, "two profiles: graphs of kilobytes"
    used = {
        tensor.name
        for graph in bundle.directory.glob("*.onnx")
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert any("encoder.layers.2.mlp" in name for name in used), "MSV-Prune reads the tower's last layer"
    # PruMerge came last and does not use it; the bundle does.
    assert all("post_layernorm" in name for name in manifest.ignored_tensors), manifest.ignored_tensors
    bundle.verify()


QK = ("self_attn.q_proj", "self_attn.k_proj")


@pytest.mark.parametrize(
    ("wanted", "read"),
    [
        (
            VisionTaps(joint_attention=(2,), keys=(2,)),
            {"layer_norm1", *QK},
        ),
        (VisionTaps(keys=(2,)), {"layer_norm1", QK[1]}),
        (VisionTaps(cls_attention=(1,)), set()),
    ],
)
def test_of_a_late_layer_only_what_is_read_is_used(
    checkpoint: Path, wanted: VisionTaps, read: set[str]
) -> None:
    """Whatever is not asked for stays in `ignored_tensors`, with a reason."""
    config = LlavaForConditionalGeneration.config_class.from_pretrained(checkpoint)
    names = llava.Vision(config, None, wanted).parameter_names()
    last = {name.split("layers.2.")[1].rsplit(".", 1)[0] for name in names if "layers.2." in name}
    assert last == read
    assert not any("projector" in name for name in names)
    assert set(llava.Vision(config, None, None).parameter_names()) > {
        "projector.layers.linear_1.weight",
        "tower.encoder.layers.1.mlp.fc2.bias",
    }
    assert llava.unused(config, "model.vision_tower.encoder.layers.2.mlp.fc1.weight")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_generate(bundle: Bundle, checkpoint: Path, tmp_path: Path, dtype: Any) -> None:
    keep, directory = STAGES["msv-prune"].keep, bundle.directory
    if dtype == "float16":
        directory = tmp_path / "half"
        export(checkpoint, profile_of(checkpoint, "msv-prune", STAGES["msv-prune"]), directory, dtype=dtype)
    with Session.open(directory, "msv-prune") as session:
        rows = session.prompt("what is w3 ?", 2)
        assert len(rows.visual_positions) == 2 * keep
        assert rows.length == len(rows.input_ids) + 2 * keep, "positions of the shortened prompt"
        visual = session.vision([noise_image(1)])
        assert visual.dtype == dtype and np.isfinite(visual).all()
        assert list(session.generate("what is w3 ?", [noise_image(1), noise_image(2)], max_new_tokens=4))
        timings = session.timings
        assert timings.select and timings.vision and timings.prefill and timings.preprocess
        assert timings.first_token == pytest.approx(
            timings.preprocess + timings.vision + timings.select + timings.prefill
        )
        assert list(session.generate("what is w3 ?", max_new_tokens=2)), "no image at all"
        assert session.timings.select is None
        assert session.vision([]).shape == (0, 64)


@pytest.mark.parametrize(
    ("by", "message"),
    [
        (HiPrune(object_layer=1, deep_layer=4), r"hiprune: attention layer 4 .* 0\.\.2"),
        (VisPruner(attention=2, features=5), r"vispruner: hidden state 5 .* 0\.\.3"),
        (PruMerge(neighbours=36, layer=2), r"neighbours: 36 .* 1\.\.35"),
        (VisionZip(contextual=12, attention=1, keys=1), r"contextual: 12 is not within 0\.\.11"),
        (MsvPrune(anchors=0.8, attention=1, middle=1, last=3), r"clusters: 4 clusters cannot share 3 tokens"),
    ],
)
def test_what_the_tower_cannot_do(checkpoint: Path, tmp_path: Path, by: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(checkpoint, profile_of(checkpoint, "bad", EncoderStage(keep=12, by=by)), tmp_path / "b")
    assert not (tmp_path / "b").exists(), "nothing half-written"


def test_towers_without_cls(checkpoint: Path) -> None:
    bare = Tower(layers=3, patches=36, cls=False, features=(2,), width=32)
    for name, stage in STAGES.items():
        if name in ("msv-received", "hiprune", "random"):
            check_tower(stage, bare, 36)
        else:
            with pytest.raises(UserError, match=r"\[CLS\], which this tower does not have; .*received: true"):
                check_tower(stage, bare, 36)
    with pytest.raises(UserError, match="36 patches and 37 visual tokens"):
        check_tower(STAGES["random"], tower(checkpoint), 37)


def test_ties_are_told_from_choices(checkpoint: Path, model: Any) -> None:
    """Without noise nothing is a tie; with noise as large as the values everything is."""
    pixels = tiny_inputs(checkpoint, images=1)["pixel_values"]
    stage = STAGES["msv-prune"]
    assert not reference_encoder.hangs_on_rounding(model, pixels, stage, 0.0)
    assert reference_encoder.hangs_on_rounding(model, pixels, stage, 1.0)
