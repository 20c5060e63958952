"""Plans by TensorRT-RTX, ahead of time, without a GPU: every method's decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from trimvlm.bundle import Bundle, record, write_manifest
from trimvlm.errors import UserError
from trimvlm.target import PlanOptions
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_engines.library import Work
from trimvlm_engines.plan import NoFusedAttentionError, Recipe, build_plan
from trimvlm_engines.shapes import ShapeRange
from trimvlm_engines.tensorrt_rtx import TensorRtRtx

trt = pytest.importorskip("tensorrt_rtx")

Contents = Callable[[], dict[str, bytes]]


class Memory:
    """A plan in memory."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes | memoryview) -> int:
        self.data += bytes(data)
        return len(data)


def plan_of(graph: Path, ranges: dict[str, ShapeRange], attention: str) -> bytes:
    """Builds `graph` for SM 8.9."""
    library = TensorRtRtx(targets.load("rtx-4090"))
    sink = Memory()
    work = Work(graph, ranges, "float32", sink=sink)
    build_plan(trt, work, Recipe(attention, PlanOptions(), library._configure))  # type: ignore[arg-type]
    return sink.data


def attention_graph(path: Path, dtype: type, head_dim: int) -> tuple[Path, dict[str, ShapeRange]]:
    """One Attention over 4 heads with a boolean mask; R rows and S keys are dynamic."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    shapes = {"q": [1, 4, "R", head_dim], "k": [1, 4, "S", head_dim], "v": [1, 4, "S", head_dim]}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["R", "S"]))
    graph = helper.make_graph(
        [helper.make_node("Attention", ["q", "k", "v", "mask"], ["o"], name="the_attention")],
        "attention",
        inputs,
        [helper.make_tensor_value_info("o", kind, shapes["q"])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), path)
    ranges = {
        name: ShapeRange(min=(1, 4, 1, head_dim), opt=(1, 4, 16, head_dim), max=(1, 4, 32, head_dim))
        for name in shapes
    }
    return path, {**ranges, "mask": ShapeRange(min=(1, 1), opt=(16, 16), max=(32, 32))}


@pytest.fixture(scope="session")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plans for rtx-4090 (SM 8.9) of every method."""
    import shutil

    bundle = Path(shutil.copytree(exported, tmp_path_factory.mktemp("rtx") / "bundle"))
    for name in Bundle(bundle).manifest.profiles:
        build(bundle, "rtx-4090", name)
    return bundle


METHODS = ["dense", "v-skip", "fastv", "vtw", "shortv", "hidivdrop", "fastv+v-skip"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds(built: Path, method: str) -> None:
    opened = Bundle(built)
    assert sorted(opened.manifest.profiles) == sorted(METHODS)
    engine = opened.manifest.profiles[method].engines["rtx-4090"]
    assert engine.graphs == {
        "vision": "vision.rtx-4090.engine",
        "decoder": f"{method}.rtx-4090.decoder.engine",
    }
    assert (engine.backend, engine.version) == ("tensorrt_rtx", trt.__version__)
    assert engine.options["decoder"]["attention"] == "decomposed"  # float32
    assert engine.options["decoder"]["ranges"]["visual"] == [[0, 64], [16, 64], [32, 64]]
    opened.verify()
    plan = opened.path(engine.graphs["decoder"])
    assert plan.stat().st_size == engine.measured["decoder_bytes"]
    # The plan holds the weights: all bytes of a matrix that the graph points to.
    model = onnx.load(
        opened.path(opened.manifest.profiles[method].decoders["fused"]), load_external_data=False
    )
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert plan.stat().st_size > sum(4 * np.prod(tensor.dims) for tensor in external)


@pytest.mark.parametrize("method", METHODS)
def test_primitive_decoders_build_too(bundle: Path, method: str) -> None:
    """The lowering for TensorRT 10.3, by the nearest builder that runs here."""
    card = msgspec.structs.replace(targets.load("rtx-4090"), name="plain", lowering="primitive")
    engine = build(bundle, card, method)
    assert engine.options["decoder"]["attention"] == "primitive"
    assert Bundle(bundle).path(engine.graphs["decoder"]).stat().st_size == engine.measured["decoder_bytes"]


@pytest.mark.parametrize("target", ["rtx-3060", "rtx-3090", "rtx-4070", "rtx-5090"])
def test_every_card_builds(bundle: Path, target: str) -> None:
    engine = build(bundle, target, "hidivdrop")
    assert engine.options["decoder"]["compute_capability"] == targets.load(target).compute_capability
    assert Bundle(bundle).manifest.profiles["hidivdrop"].engines == {target: engine}


def test_plans_differ_by_card(exported: Path) -> None:
    manifest = Bundle(exported)
    path = manifest.path(manifest.manifest.profiles["dense"].vision)
    ranges = {"pixel_values": ShapeRange(min=(1, 3, 32, 32), opt=(1, 3, 32, 32), max=(2, 3, 32, 32))}
    plans = set()
    for name in ("rtx-3090", "rtx-4090", "rtx-5090"):
        sink = Memory()
        TensorRtRtx(targets.load(name)).make(Work(path, ranges, "float32", sink=sink))
        plans.add(sink.data)
    assert len(plans) == 3


def test_second_build_is_skipped(bundle: Path, contents: Contents) -> None:
    told: list[tuple[str, str]] = []
    build(bundle, "rtx-4090", "vtw")
    before = contents()
    build(bundle, "rtx-4090", "vtw", tell=lambda role, state: told.append((role, state)))
    assert told == [("vision", "up to date"), ("decoder", "up to date")]
    assert contents() == before


def test_other_limits_make_plans_stale(bundle: Path) -> None:
    card = targets.load("rtx-4090")
    build(bundle, card, "vtw")
    told: list[tuple[str, str]] = []
    limits = msgspec.structs.replace(card.limits, text=64)
    build(bundle, msgspec.structs.replace(card, limits=limits), "vtw", tell=lambda *pair: told.append(pair))
    assert told == [("vision", "up to date"), ("decoder", "building"), ("decoder", "built")]


def test_plan_that_another_profile_has_replaced_is_not_taken_for_the_old_one(bundle: Path) -> None:
    """Profiles share the vision plan; a build with other limits replaces it under the same name."""
    card = targets.load("rtx-4090")
    one = msgspec.structs.replace(card, limits=msgspec.structs.replace(card.limits, images=1))
    build(bundle, card, "dense")
    build(bundle, card, "vtw")
    build(bundle, one, "dense")
    told: list[tuple[str, str]] = []
    engine = build(bundle, card, "vtw", tell=lambda *pair: told.append(pair))
    assert ("vision", "built") in told and ("decoder", "up to date") in told
    assert engine.options["vision"]["ranges"]["pixel_values"][2] == [2, 3, 32, 32]
    Bundle(bundle).verify()


def test_failed_build_leaves_nothing(bundle: Path, contents: Contents) -> None:
    """The vision plan is built by then, and must not stay either."""
    graph = bundle / "dense.decoder.fused.onnx"
    model = onnx.load(graph, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.name, node.op_type = "spoilt_node", "Atention"
    manifest = Bundle(bundle).manifest
    graph.write_bytes(model.SerializeToString())
    files = {**manifest.files, graph.name: record(graph)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    before = contents()
    with pytest.raises(
        UserError, match=r"dense.decoder.fused.onnx: node spoilt_node \(Atention\): "
    ) as caught:
        build(bundle, "rtx-4090", "dense")
    assert "\n" not in str(caught.value)
    assert contents() == before


def test_float32_attention_has_no_kernel_and_is_decomposed(tmp_path: Path) -> None:
    graph, ranges = attention_graph(tmp_path / "a.onnx", np.float32, 64)
    with pytest.raises(NoFusedAttentionError):
        plan_of(graph, ranges, "fused")
    assert plan_of(graph, ranges, "decomposed")
    sink = Memory()
    assert TensorRtRtx(targets.load("rtx-4090")).make(Work(graph, ranges, "float32", sink=sink)) == {
        "attention": "decomposed"
    }
    assert sink.data


@pytest.mark.parametrize(("head_dim", "attention"), [(64, "fused"), (8, "decomposed")])
def test_float16_attention_says_whether_it_is_fused(tmp_path: Path, head_dim: int, attention: str) -> None:
    graph, ranges = attention_graph(tmp_path / "a.onnx", np.float16, head_dim)
    sink = Memory()
    assert TensorRtRtx(targets.load("rtx-4090")).make(Work(graph, ranges, "float16", sink=sink)) == {
        "attention": attention
    }
    assert sink.data


def test_input_without_a_range(tmp_path: Path) -> None:
    graph, ranges = attention_graph(tmp_path / "a.onnx", np.float16, 64)
    with pytest.raises(UserError, match=r"input mask \[-1, -1\] has no shape range; export it again"):
        plan_of(graph, {name: shape for name, shape in ranges.items() if name != "mask"}, "fused")
    other = ranges | {"q": ShapeRange(min=(1, 4, 1, 32), opt=(1, 4, 1, 32), max=(1, 4, 2, 32))}
    with pytest.raises(UserError, match=r"input q .* has the range \(1, 4, 1, 32\)"):
        plan_of(graph, other, "fused")


def test_disk_that_fills_up(tmp_path: Path) -> None:
    class Full:
        def write(self, data: bytes | memoryview) -> int:
            raise OSError(28, "No space left on device", "plan")

    graph, ranges = attention_graph(tmp_path / "a.onnx", np.float16, 64)
    with pytest.raises(OSError, match="No space left"):
        TensorRtRtx(targets.load("rtx-4090")).make(Work(graph, ranges, "float16", sink=Full()))


def test_library_that_is_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    card = targets.load("rtx-4090")
    with pytest.raises(UserError, match=r"tensorrt_rtx .* is installed, but it takes <1.1; pip install"):
        TensorRtRtx(msgspec.structs.replace(card, versions="<1.1"))
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(
        UserError, match=r"target rtx-4090: tensorrt_rtx is not installed; pip install 'trimvlm\[rtx\]'"
    ):
        TensorRtRtx(card)
