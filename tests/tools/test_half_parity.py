"""A tiny checkpoint in half precision: graphs within their stated limits, plans, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto, shape_inference
from tiny_models import noise_image, tiny_llava

from trimvlm.bundle import Bundle, write_manifest
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, LayerRule, Method, Profile, Select
from trimvlm.rules import ValueInfluence
from trimvlm.session import Session
from trimvlm_calib.samples import Sample
from trimvlm_engines.build import build
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_tools.parity.check import check
from trimvlm_tools.parity.compare import KV, LIMITS, LOGITS, OF_LARGEST, VISUAL

HALVES: dict[Any, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

# A score that takes values as well as attention, and a layer whose text runs alone.
DECISIONS = Decisions(
    select=(Select(layer=1, keep=12, by=ValueInfluence()),), layers=(LayerRule(layers=(1,), query="none"),)
)


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped", "alone"])
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """Of query heads that share key heads, and of those that do not (`passes/one_row.py`)."""
    root = tmp_path_factory.mktemp("half")
    checkpoint = tiny_llava(root / "model", layers=2, kv_heads=request.param, vision_layers=2)
    profile = Profile(
        name="all", method=Method(name="by hand"), model=model_spec(checkpoint), decisions=DECISIONS
    )
    return {dtype: Bundle(export(checkpoint, profile, root / dtype, dtype=dtype)) for dtype in HALVES}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    root = tmp_path_factory.mktemp("images")
    for number in range(2):
        noise_image(number).save(root / f"{number}.png")
    return [Sample(image=root / f"{number}.png", question=f"where is w{number} ?") for number in range(2)]


def other_lowering(bundle: Bundle, out: Path) -> Bundle:
    """A copy whose fused decoder is the primitive one."""
    shutil.copytree(bundle.directory, out)
    manifest = bundle.manifest
    entry = manifest.profiles["all"]
    decoders = {"fused": entry.decoders["primitive"]}
    changed = {"all": msgspec.structs.replace(entry, decoders=decoders)}
    write_manifest(out, msgspec.structs.replace(manifest, profiles=changed))
    return Bundle(out)


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
@pytest.mark.parametrize("dtype", HALVES)
def test_graphs_are_within_the_limits_of_their_precision(
    bundles: dict[str, Bundle], questions: list[Sample], tmp_path: Path, dtype: str, lowering: str
) -> None:
    """With forced indices: near a tie another row may be selected."""
    bundle = bundles[dtype] if lowering == "fused" else other_lowering(bundles[dtype], tmp_path / "copy")
    report = check(bundle, "all", questions, data="tiny", max_new_tokens=4)
    (rung,) = (rung for rung in report.rungs if "forced" in rung.name)
    assert ("rounded after every operator" in rung.name) == (dtype == "bfloat16")
    found = {metric.name: metric for metric in rung.metrics}
    for name in (VISUAL + OF_LARGEST, LOGITS + OF_LARGEST, KV):
        value = found[name].value
        assert found[name].verdict == "PASS", (name, value)
        assert value is not None and value > LIMITS["float32"].kv, f"{name}: {value} is no half precision's"
    assert not list(bundle.directory.parent.glob(".rounded*"))


@pytest.mark.parametrize("dtype", HALVES)
def test_graphs_decide_in_float32(bundles: dict[str, Bundle], dtype: str) -> None:
    """Scores, their softmax and norms' statistics are float32 in either lowering, and no value is of the
    other half precision."""
    paths = sorted(bundles[dtype].directory.glob("*.onnx"))
    assert len(paths) == 4
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
        graph = shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
        graphs = [graph, *(each.g for node in graph.node for each in node.attribute if each.HasField("g"))]
        values = [value for each in graphs for value in (*each.value_info, *each.input, *each.output)]
        kinds = {value.name: value.type.tensor_type.elem_type for value in values}
        kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        other = set(HALVES.values()) - {HALVES[dtype]}
        assert not other & set(kinds.values())
        decide = {"TopK", "ReduceMean", "ReduceSum", "Cos", "Sin", "Sqrt"}
        decide |= {"Softmax"} if "decoder" in path.name else set()
        nodes = [node for each in graphs for node in each.node if node.op_type in decide]
        read = {(node.op_type, kinds[node.input[0]]) for node in nodes}
        assert not {operator for operator, kind in read if kind == HALVES[dtype]}, path.name
        assert "decoder" not in path.name or ("Softmax", TensorProto.FLOAT) in read


def test_onnx_runtime_on_a_cpu_refuses_bfloat16(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["bfloat16"]
    with pytest.raises(UserError, match="--dtype float32 or float16, or open it for a target"):
        Session.open(bundle, "all")
    with pytest.raises(
        UserError,
        match=r"the weights are bfloat16, but target ort-cpu runs float32, float16; export with --dtype "
        r"float32, or build for a target that runs bfloat16 \(trimvlm targets\)",
    ):
        build(bundle.directory, "ort-cpu", "all")


def test_cards_get_plans_in_bfloat16(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Path(shutil.copytree(bundles["bfloat16"].directory, tmp_path / "bundle"))
    engine = build(bundle, "rtx-3060", "all")
    assert engine.options["decoder"]["attention"] == "fused"
    plans = Bundle(bundle)
    weights = sum(plans.manifest.files[name].bytes for name in plans.manifest.weights)
    assert plans.path(engine.graphs["decoder"]).stat().st_size > weights / 2
