"""Bundles on disk: graphs that run, weights in place, strict loading, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_inputs, tiny_llava
from transformers import LlavaForConditionalGeneration

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.opening import on_cpu
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm.text import Prompt
from trimvlm_export import export as bundle_export
from trimvlm_export import source
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_export.families import llava
from trimvlm_export.reference import Reference

OWN, PREVIOUS = LastRowAttention(attention="own"), LastRowAttention(attention="previous")
LAYERS = 5

# Between them: every field of the Schedule.
DECISIONS = {
    "dense": Decisions(),
    "late": Decisions(
        inject=1, exit=4, select=(Select(layer=2, keep=7, by=OWN), Select(layer=3, keep=1, by=OWN))
    ),
    "skips": Decisions(
        select=(Select(layer=2, keep=8, by=PREVIOUS),),
        layers=(
            LayerRule(layers=(0, 3), query="none"),
            LayerRule(layers=(3,), ffn="none"),
            LayerRule(layers=(4,), cache="none"),
        ),
    ),
    "blind": Decisions(
        mask="post_softmax",
        layers=(
            LayerRule(layers=(1,), text_keys="none"),
            LayerRule(layers=(1, 2), visual_keys="none"),
            LayerRule(layers=(3,), execute="none"),
        ),
    ),
    "compact": Decisions(
        positions="compact", select=(Select(layer=1, keep=8, by=PREVIOUS), Select(layer=3, keep=3, by=OWN))
    ),
}


def profile_of(checkpoint: Path, name: str, **changes: Any) -> Profile:
    return Profile(
        name=name,
        method=Method(name="by hand"),
        model=model_spec(checkpoint),
        decisions=DECISIONS.get(name, Decisions()),
        **changes,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("export") / "model", layers=LAYERS, kv_heads=2)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    out = checkpoint.parent / "bundle"
    for name in DECISIONS:
        export(checkpoint, profile_of(checkpoint, name), out)
    return Bundle(out)


class Graph(Session):
    """A Session on one lowering, fed with rows that the Hugging Face processor made."""

    @classmethod
    def of(cls, bundle: Bundle, name: str, lowering: Any) -> Graph:
        session = Session.open(bundle, name)
        session._runner.backends[name].files = {  # type: ignore[attr-defined]
            "vision": bundle.path(bundle.manifest.profiles[name].vision),
            "decoder": bundle.path(bundle.manifest.profiles[name].decoders[lowering]),
        }
        session.__class__ = cls
        return session  # type: ignore[return-value]


def rows_of(inputs: dict[str, Any]) -> Prompt:
    ids = inputs["input_ids"][0].numpy()
    places = np.arange(len(ids))
    return Prompt(input_ids=ids[ids != 4], text_positions=places[ids != 4], visual_positions=places[ids == 4])


@pytest.mark.parametrize("lowering", ["fused", "in_place", "primitive"])
@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("images", [1, 2])
def test_graph_equals_reference(
    bundle: Bundle, checkpoint: Path, name: str, lowering: str, images: int
) -> None:
    if lowering == "in_place" and on_cpu(bundle.manifest.profiles[name]) != lowering:
        pytest.skip("this ONNX Runtime has no TensorScatter")
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    schedule = Schedule.resolve(bundle.profile(name), bundle.manifest.profiles[name].model)
    inputs = tiny_inputs(checkpoint, images=images, seed=5)
    with Reference(model, schedule) as reference, Graph.of(bundle, name, lowering) as session:
        expected = reference.prefill(inputs)
        visual = session.vision(inputs["pixel_values"].numpy()[:, None])
        np.testing.assert_allclose(visual, reference.features(inputs), atol=1e-4)
        outputs = session.prefill(rows_of(inputs), visual)
        for stage, rows in enumerate(expected.selected):
            assert outputs[f"selected.{stage}"].tolist() == rows.tolist()
            np.testing.assert_allclose(outputs[f"scores.{stage}"], expected.scores[stage], atol=1e-5)
        np.testing.assert_allclose(outputs["logits"][0], expected.logits, atol=1e-4)
        for layer, pair in enumerate(expected.kv):
            assert (f"present_key.{layer}" in outputs) == (pair is not None)
            if pair is not None:
                np.testing.assert_allclose(outputs[f"present_key.{layer}"], pair[0], atol=1e-4)
                np.testing.assert_allclose(outputs[f"present_value.{layer}"], pair[1], atol=1e-4)
        for token in (7, 30, 9):
            outputs = session.step(token, outputs)
            np.testing.assert_allclose(outputs["logits"][0], reference.step(token), atol=1e-4)


def test_one_copy_of_the_weights(bundle: Bundle, checkpoint: Path) -> None:
    weights = bundle.directory / "checkpoint" / "model.safetensors"
    assert weights.samefile(checkpoint / "model.safetensors"), "linked, not copied"
    total = sum(file.stat().st_size for file in bundle.directory.rglob("*") if file.is_file())
    graphs = total - weights.stat().st_size
    assert graphs < 1_500_000, "five profiles, two lowerings: graphs of kilobytes"
    for graph in bundle.directory.glob("*.onnx"):
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
            if int(np.prod(tensor.dims)) > 64:
                assert tensor.data_location == onnx.TensorProto.EXTERNAL, (graph.name, tensor.name)


def test_graphs_keep_nothing_of_the_machine_that_traced_them(bundle: Bundle) -> None:
    for graph in bundle.directory.glob("*.onnx"):
        assert b"site-packages" not in graph.read_bytes()
        assert str(Path(__file__).parents[2]).encode() not in graph.read_bytes()


def test_second_profile_leaves_the_first_and_the_weights_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(checkpoint, profile_of(checkpoint, "dense"), tmp_path / "b")
    ignored = Bundle(tmp_path / "b").manifest.ignored_tensors
    monkeypatch.delattr(llava, "Vision")  # its graph is there, and says which tensors it took
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "b").glob("*.onnx")}
    size = sum(f.stat().st_size for f in (tmp_path / "b").rglob("*") if f.is_file())
    export(checkpoint, profile_of(checkpoint, "late"), tmp_path / "b")
    after = Bundle(tmp_path / "b")
    assert sorted(after.manifest.profiles) == ["dense", "late"]
    assert {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in before} == before
    added = sum(f.stat().st_size for f in (tmp_path / "b").rglob("*") if f.is_file()) - size
    assert added < 1_000_000
    assert after.manifest.ignored_tensors == ignored
    after.verify()


def test_processing_is_proven_once_for_the_same_files(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    export(model, profile_of(model, "dense"), tmp_path / "b")
    proven: list[tuple[str, Path]] = []

    def counted(module: Any, name: str) -> None:
        prove = getattr(module, name)
        monkeypatch.setattr(module, name, lambda path: [proven.append((name, path)), prove(path)][1])

    counted(bundle_export, "image_processing")
    counted(source, "tokenizer_json")
    export(model, profile_of(model, "late"), tmp_path / "b")
    assert proven == []
    options = model / "preprocessor_config.json"
    if not options.exists():
        options = model / "processor_config.json"
    options.write_text(json.dumps(json.loads(options.read_text())) + "\n")
    export(model, profile_of(model, "blind"), tmp_path / "b")
    assert proven == [("image_processing", model), ("tokenizer_json", model)]


def test_every_tensor_is_used_or_ignored_for_a_reason(bundle: Bundle, checkpoint: Path) -> None:
    used = {
        tensor.name
        for graph in bundle.directory.glob("*.onnx")
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    ignored = bundle.manifest.ignored_tensors
    assert all(reason for reason in ignored.values())
    stored = load_file(checkpoint / "model.safetensors")
    assert len(used) + len(ignored) == len(stored)
    assert all("layers.2" in name or "post_layernorm" in name for name in ignored), ignored


def changed(checkpoint: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with other tensors."""
    out.mkdir()
    for file in checkpoint.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


NORM = "language_model.model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), r"no tensor for model\.language_model\.norm\.weight \[64\]"),
        (lambda t: t.update({NORM: torch.ones(63)}), r"norm\.weight is \[63\], the model needs \[64\]"),
        (lambda t: t.update({"extra.weight": torch.ones(2)}), r"extra\.weight is not used"),
        (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)}), r"norm\.weight is I64"),
    ],
)
def test_loading_cannot_lie(checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    other = changed(checkpoint, tmp_path / "other", change)
    with pytest.raises(UserError, match=message):
        export(other, profile_of(other, "dense"), tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["other"], "nothing half-written"


def test_half_precision_converts_once_and_refuses_overflow(checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, profile_of(checkpoint, "dense"), tmp_path / "half", dtype="float16")
    stored = load_file(tmp_path / "half" / "checkpoint" / "model.safetensors")
    source = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(stored[name], tensor.half()) for name, tensor in source.items())
    mtime = (tmp_path / "half" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    export(checkpoint, profile_of(checkpoint, "late"), tmp_path / "half", dtype="float16")
    assert (tmp_path / "half" / "checkpoint" / "model.safetensors").stat().st_mtime_ns == mtime
    with Session.open(tmp_path / "half", "late") as session:
        rows = session.prompt("what is w3 ?", 1)
        logits = session.prefill(rows, session.vision([np.zeros((1, 3, 32, 32), np.float32)]))["logits"]
    assert logits.dtype == np.float32 and np.isfinite(logits).all()
    huge = changed(checkpoint, tmp_path / "huge", lambda t: t[NORM].fill_(1e6))
    with pytest.raises(UserError, match=r"norm\.weight has values that float16 cannot hold"):
        export(huge, profile_of(huge, "dense"), tmp_path / "never", dtype="float16")
    assert not (tmp_path / "never").exists()


def test_another_checkpoint_or_directory_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="not a bundle"):
        export(checkpoint, profile_of(checkpoint, "dense"), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        export(tmp_path / "mine", profile_of(checkpoint, "dense"), tmp_path / "out")
    other = tiny_llava(tmp_path / "other", layers=LAYERS, kv_heads=2, seed=9)
    with pytest.raises(UserError, match="fingerprint"):
        export(other, profile_of(checkpoint, "dense"), tmp_path / "out")


def test_sharded_checkpoint_in_the_old_naming(checkpoint: Path, tmp_path: Path) -> None:
    """Two shards, names as transformers 4 wrote them."""
    other = tmp_path / "old"
    other.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, other / shard, metadata={"format": "pt"})
    index = {"weight_map": {name: shard for shard, chosen in shards.items() for name in chosen}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    export(other, profile_of(other, "dense"), tmp_path / "b")
    assert len(Bundle(tmp_path / "b").manifest.weights) == 2
    (other / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="shard model-00002-of-00002"):
        export(other, profile_of(checkpoint, "dense"), tmp_path / "c")
