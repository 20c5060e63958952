"""Decoders in blocks of layers answer as whole ones do, bit for bit, under every kind of Schedule; so, within
float32, do those whose caches grow in place."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
import pytest
from method_decisions import LAYERS, METHODS
from onnx import helper, numpy_helper
from operator_list import refused
from random_decisions import random_decisions
from tiny_models import tiny_llava
from whole_and_split import assert_close_answers, assert_same_answers

from trimvlm.backends.blocks import CARRIED
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.opening import IN_PLACE_SINCE
from trimvlm.profile import Decisions, LayerRule, Select, SkipMode, SkipStage
from trimvlm.rules import CrossAndSelfAttention, LastRowAttention, RouterScores, TextAttention, ValueInfluence
from trimvlm.schedule import Schedule, resolve
from trimvlm.target import Limits, numbers
from trimvlm_engines.shapes import decoder_ranges
from trimvlm_engines.splitting import Piece, pieces
from trimvlm_engines.splitting.blocks import cut
from trimvlm_engines.splitting.boundaries import LAYER
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import export_decoder
from trimvlm_export.source import Source

# What METHODS lack: skip mode, a router, masks that are carried from layer to layer, ids that restart.
OTHERS = {
    "skip": Decisions(
        skip=SkipMode(stages=(SkipStage(layer=1, count=2), SkipStage(layer=2, count=5))),
        layers=(LayerRule(layers=(1, 3), query="unskipped"), LayerRule(layers=(2, 4), ffn="unskipped")),
    ),
    "masked": Decisions(
        mask="post_softmax",
        exit=4,
        select=(Select(layer=2, keep=9, by=ValueInfluence(threshold=0.05)),),
        layers=(LayerRule(layers=(0,), text_keys="sink", visual_keys="none"),),
    ),
    "compact": Decisions(
        positions="compact",
        select=(
            Select(layer=1, keep=8, by=LastRowAttention(attention="own")),
            Select(layer=3, keep=5, by=RouterScores()),
            Select(layer=4, keep=2, by=TextAttention()),
        ),
    ),
    "gap": Decisions(
        select=(Select(layer=1, keep=8, by=CrossAndSelfAttention()),),
        layers=(LayerRule(layers=(4,), execute="decode"), LayerRule(layers=(2, 3), execute="none")),
    ),
}
RANDOM = int(os.environ.get("TRIMVLM_GRAPHS", "0"))


def split(graph: Path, schedule: Schedule, **limits: int) -> list[Piece]:
    wanted = Limits(**limits)
    return pieces(graph, wanted, decoder_ranges(schedule, wanted))


def assert_no_shape_is_carried(blocks: list[Piece]) -> None:
    """TensorRT would want it on the host: nothing that is carried says how large something else is."""
    places = {
        "Reshape": (1,),
        "Expand": (1,),
        "Slice": (1, 2, 3),
        "TopK": (1,),
        "Range": (0, 1, 2),
        "Tile": (1,),
    }
    for piece in blocks:
        for node in onnx.ModelProto.FromString(piece.graph or b"").graph.node:
            sizes = [node.input[place] for place in places.get(node.op_type, ()) if place < len(node.input)]
            assert not any(name.startswith(CARRIED) for name in sizes), (piece.role, node.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    directory = tmp_path_factory.mktemp("blocks")
    checkpoint = tiny_llava(directory / "checkpoint", layers=LAYERS, kv_heads=2, tie=True)
    return Source.place(checkpoint, directory / "bundle", "float32")


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(exported: Path, method: str, lowering: str) -> None:
    bundle = Bundle(exported)
    entry = bundle.manifest.profiles[method]
    schedule = Schedule.resolve(bundle.profile(method), entry.model)
    graph = bundle.path(entry.decoders[lowering])  # type: ignore[index]
    for layers, count in ((1, 5), (2, 3), (4, 2), (9, 1)):
        blocks = split(graph, schedule, layers_per_engine=layers)
        assert [piece.role for piece in blocks] == [f"decoder.{number}" for number in range(count)]
        assert_same_answers(graph, blocks, schedule)
        assert_no_shape_is_carried(blocks)


@pytest.mark.parametrize("case", [*OTHERS, *range(RANDOM)])
def test_every_kind_of_schedule(source: Source, case: str | int) -> None:
    """Also random ones, as many as `TRIMVLM_GRAPHS` says: tracing one takes seconds."""
    spec = model_spec(source.out.parent / "checkpoint")
    decisions = OTHERS[case] if isinstance(case, str) else random_decisions(Random(case), spec)
    schedule = resolve(decisions, spec)
    files = export_decoder(source, f"case-{case}", schedule)
    in_place = files.pop("in_place", None)  # runs in one piece
    if in_place and numbers(onnxruntime.__version__) >= IN_PLACE_SINCE:
        assert_close_answers(source.out / files["fused"], source.out / in_place, schedule, images=2)
    for name in files.values():
        graph = source.out / name
        pairs = split(graph, schedule, layers_per_engine=2)
        assert_same_answers(graph, pairs, schedule, images=2)
        assert len(pairs) == 2 or case != "gap"  # layers that are not executed make no block
        both = split(graph, schedule, layers_per_engine=1, lm_head_columns=24)
        assert_same_answers(graph, both, schedule)
        assert_no_shape_is_carried(both)


def test_a_block_holds_its_own_weights_and_caches(exported: Path) -> None:
    bundle = Bundle(exported)
    schedule = Schedule.resolve(bundle.profile("hidivdrop"), bundle.manifest.profiles["hidivdrop"].model)
    graph = bundle.path("hidivdrop.decoder.primitive.onnx")
    whole = onnx.load(graph, load_external_data=False).graph
    weights, total = {tensor.name for tensor in whole.initializer if tensor.external_data}, 0
    for number, piece in enumerate(split(graph, schedule, layers_per_engine=2)):
        block = onnx.ModelProto.FromString(piece.graph or b"").graph
        mine = {tensor.name for tensor in block.initializer if tensor.external_data}
        weights -= mine
        total += len(mine)
        for value in (*block.input, *(tensor for tensor in block.initializer if tensor.external_data)):
            # The first block gives the others lengths of their pasts as nothing but shapes.
            if (found := LAYER.match(value.name)) and value.name.startswith(("layers", "past_value")):
                assert int(found[1]) // 2 == number, value.name
    assert not weights and total == sum(1 for tensor in whole.initializer if tensor.external_data)


def test_what_is_carried_has_static_rank_and_type(exported: Path) -> None:
    """The residual stream, masks and rotary tables; no shapes, no weights, nothing as large as a past."""
    bundle = Bundle(exported)
    schedule = Schedule.resolve(bundle.profile("v-skip"), bundle.manifest.profiles["v-skip"].model)
    graph = bundle.path("v-skip.decoder.primitive.onnx")
    second = split(graph, schedule, layers_per_engine=2)[1]
    block = onnx.ModelProto.FromString(second.graph or b"").graph
    carried = {value.name: value.type.tensor_type for value in block.input if value.name.startswith(CARRIED)}
    kinds = sorted(
        (kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim)) for kind in carried.values()
    )
    boolean, number = onnx.TensorProto.BOOL, onnx.TensorProto.FLOAT
    assert (number, (0, schedule.model.hidden)) in kinds and (boolean, (0, 0)) in kinds
    assert all(kind.shape.dim for kind in carried.values())
    hidden = next(name for name, kind in carried.items() if kind.shape.dim[-1].dim_value == 64)
    limits = Limits()
    rows = limits.text + limits.images * schedule.visual_tokens
    assert second.ranges[hidden].plain() == [[1, 64], [32 + schedule.visual_tokens, 64], [rows, 64]]


def test_graph_that_says_no_type_where_it_is_cut(exported: Path) -> None:
    model = onnx.load(exported / "dense.decoder.fused.onnx", load_external_data=False)
    del model.graph.value_info[:]
    with pytest.raises(UserError, match=r"does not say the type of \w+.*; export it again"):
        cut(model, 2)


@pytest.mark.parametrize("method", ["dense", "fastv+v-skip", "hidivdrop"])
def test_tensorrt_10_3_knows_every_operator(exported: Path, tmp_path: Path, method: str) -> None:
    bundle = Bundle(exported)
    entry = bundle.manifest.profiles[method]
    schedule = Schedule.resolve(bundle.profile(method), entry.model)
    graph = bundle.path(entry.decoders["primitive"])
    for piece in split(graph, schedule, layers_per_engine=2, lm_head_columns=24):
        (tmp_path / "piece.onnx").write_bytes(piece.graph or b"")
        assert refused(tmp_path / "piece.onnx") == [], piece.role


def test_what_is_made_of_weights_alone_is_made_in_each_block() -> None:
    """As weights are from codes: two layers read one matrix, and each a matrix of its own."""
    number = onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("DequantizeLinear", ["head.codes", "scale"], ["head"]),
        helper.make_node("DequantizeLinear", ["layers.0.codes", "scale"], ["first"]),
        helper.make_node("MatMul", ["x", "first"], ["a"]),
        helper.make_node("MatMul", ["a", "head"], ["b"]),
        helper.make_node("DequantizeLinear", ["layers.1.codes", "scale"], ["second"]),
        helper.make_node("MatMul", ["b", "second"], ["c"]),
        helper.make_node("MatMul", ["c", "head"], ["logits"]),
    ]
    ones = np.ones((4, 4), np.int8)
    codes = [numpy_helper.from_array(ones, f"{name}.codes") for name in ("head", "layers.0", "layers.1")]
    graph = helper.make_graph(
        nodes,
        "codes",
        [helper.make_tensor_value_info("x", number, ["rows", 4])],
        [helper.make_tensor_value_info("logits", number, ["rows", 4])],
        [*codes, numpy_helper.from_array(np.float32(0.5), "scale")],
        value_info=[helper.make_tensor_value_info(name, number, ["rows", 4]) for name in "abc"],
    )
    blocks = cut(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), 1)
    kinds = [[node.op_type for node in block.graph.node] for block in blocks]
    assert [kind.count("DequantizeLinear") for kind in kinds] == [2, 2]
    assert [value.name for value in blocks[1].graph.input] == [f"{CARRIED}b"]
    weights = {tensor.name for tensor in blocks[1].graph.initializer}
    assert weights == {"head.codes", "layers.1.codes", "scale"}
