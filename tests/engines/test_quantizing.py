"""Weight-only quantisation, against two other ways of computing it."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from decoder_feeds import prefill_feeds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper
from safetensors import safe_open

from trimvlm.bundle import Bundle
from trimvlm.schedule import Schedule
from trimvlm.target import Weights
from trimvlm_engines.quantizing.codes import dequantize, pack, quantize
from trimvlm_engines.quantizing.graph import quantize_graph
from trimvlm_engines.quantizing.store import Store, blocked_matrices
from trimvlm_engines.rewriting import replace_nodes

SCHEMES = [Weights(bits=bits, block=block) for bits in (4, 8) for block in (16, 32, 64)]


@given(
    weight=arrays.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32)),
    scheme=st.sampled_from(SCHEMES),
)
def test_codes_are_the_nearest(weight: np.ndarray, scheme: Weights) -> None:
    """Each value is off by half a step at most, and no step is larger than it must be."""
    codes, scales = quantize(weight, scheme.bits, scheme.block, np.dtype(np.float32))
    zero, step = 1 << (scheme.bits - 1), np.repeat(scales, scheme.block, axis=1)
    assert codes.max() < 2 * zero and scales.min() >= 0
    off = np.abs(dequantize(codes, scales, scheme.bits) - weight)
    assert np.all(off <= 0.5 * step + 1e-5 * np.abs(weight) + 1e-30)
    blocks = codes.reshape(3, -1, scheme.block)
    full = (blocks == 0) | (blocks == 2 * zero - 1)
    assert np.all(full.any(axis=2) | (scales < 1e-38)), "a code at the end of the range is in use"


@pytest.mark.parametrize("signed", [False, True])
def test_bytes_are_those_of_onnx(signed: bool) -> None:
    """What `pack` writes is what onnx reads."""
    codes = np.random.default_rng(0).integers(0, 16, (4, 32), dtype=np.uint8)
    kind = onnx.TensorProto.INT4 if signed else onnx.TensorProto.UINT4
    tensor = onnx.TensorProto(data_type=kind, dims=[4, 32], raw_data=pack(codes, 4, signed=signed).tobytes())
    read = onnx.numpy_helper.to_array(tensor).astype(np.int32)
    assert np.array_equal(read, codes.astype(np.int32) - 8 * signed)
    wide = np.random.default_rng(0).integers(0, 256, (4, 32), dtype=np.uint8)
    values = pack(wide, 8, signed=signed).view(np.int8 if signed else np.uint8)
    assert np.array_equal(values.astype(np.int32), wide.astype(np.int32) - 128 * signed)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("method", ["dense", "v-skip", "hidivdrop"])
def test_graphs_agree(bundle: Path, scheme: Weights, method: str) -> None:
    """MatMulNBits, DequantizeLinear, and the graph itself on the weights that the codes stand for."""
    opened = Bundle(bundle)
    _, entry = opened.entry(method)
    model = onnx.load(str(opened.path(entry.decoders["fused"])), load_external_data=False)
    schedule = Schedule.resolve(opened.profile(method), entry.model)
    found = blocked_matrices(model, scheme, "dequantize")  # in whole blocks, which both forms take
    assert len(found) == 7 * schedule.model.layers + 1, "every projection of every layer, and the head"
    feeds = prefill_feeds(schedule, text=6, before_image=2)
    outputs = {}
    for form in ("matmul", "dequantize"):
        store = Store(f"{form}.safetensors", scheme, form, found)
        with (bundle / store.name).open("wb") as sink:
            store.write(sink.write, bundle)
        made = onnx.ModelProto()
        made.CopyFrom(model)
        quantize_graph(made, store)
        outputs[form] = run(made, bundle, feeds)
    with safe_open(bundle / "matmul.safetensors", "numpy") as tensors:
        assert set(tensors.keys()) == {
            f"{each.name}.{part}" for each in found for part in ("codes", "scales")
        }
    for tensor in model.graph.initializer:
        matrix = next((each for each in found if each.name == tensor.name), None)
        if matrix:
            codes, scales = quantize(
                np.concatenate([*matrix.parts(bundle)]), scheme.bits, matrix.block, np.dtype(np.float32)
            )
            tensor.CopyFrom(onnx.numpy_helper.from_array(dequantize(codes, scales, scheme.bits), tensor.name))
    outputs["plain"] = run(model, bundle, feeds)
    for form in ("matmul", "dequantize"):
        for name, value in outputs["plain"].items():
            assert np.allclose(outputs[form][name], value, atol=2e-5), (form, name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block"), [(40, 32), (24, 128), (33, 16)])
def test_the_last_block_of_a_row_may_be_short(tmp_path: Path, bits: int, width: int, block: int) -> None:
    """For ONNX Runtime; TensorRT is given whole blocks or floats."""
    rng, scheme = np.random.default_rng(9), Weights(bits=bits, block=block)  # type: ignore[arg-type]
    weight = rng.normal(size=(8, width)).astype(np.float32)
    weight.tofile(tmp_path / "model.safetensors")
    model = products(["w"], residual=False, width=width)
    whole = blocked_matrices(model, scheme, "dequantize")
    assert [each.block for each in whole] == ([] if width % 16 else [16])
    store = Store("matmul", scheme, "matmul", blocked_matrices(model, scheme, "matmul"))
    quantize_graph(model, store)
    with (tmp_path / "matmul").open("wb") as sink:
        store.write(sink.write, tmp_path)
    x = rng.normal(size=(3, width)).astype(np.float32)
    codes, scales = quantize(weight, bits, block, np.dtype(np.float32))
    rounded = dequantize(codes, scales, bits)
    assert not rounded[:, width:].any()
    wanted = x @ rounded[:, :width].T + np.arange(8)
    feeds = {"x": x, "rows": np.zeros((3, 8), np.float32)}
    np.testing.assert_allclose(run(model, tmp_path, feeds)["y0"], wanted, atol=2e-5)


def test_what_reads_the_same_rows_is_one_product(bundle: Path) -> None:
    """Keys, values and queries; without the queries where those are of fewer rows, as the last layer's."""
    opened, scheme = Bundle(bundle), Weights(bits=4, block=16)
    for method, merged in (("dense", [3, 3, 3, 3, 2]), ("v-skip", [3, 3, 3, 2, 2])):
        _, entry = opened.entry(method)
        model = onnx.load(str(opened.path(entry.decoders["fused"])), load_external_data=False)
        before = collections.Counter(node.op_type for node in model.graph.node)
        quantize_graph(model, Store("store", scheme, "matmul", blocked_matrices(model, scheme, "matmul")))
        after = collections.Counter(node.op_type for node in model.graph.node)
        splits = [node for node in model.graph.node if node.name.endswith(".split")]
        assert sorted(len(node.output) for node in splits) == sorted(merged)
        assert after["MatMulNBits"] == before["Gemm"] - sum(merged) + len(merged)
        norms = after["SkipSimplifiedLayerNormalization"]
        assert norms > 6 and norms + after["RMSNormalization"] == before["RMSNormalization"]
        assert before["Add"] - after["Add"] == norms


def test_a_bias_is_merged_and_a_residual_is_not(tmp_path: Path) -> None:
    """Gemms of rows `x` with biases; with one that adds rows they stay apart. They give what DequantizeLinear
    and Gemm give."""
    rng, scheme = np.random.default_rng(8), Weights(bits=4, block=16)
    feeds = {each: rng.normal(size=(3, size)).astype(np.float32) for each, size in (("x", 32), ("rows", 8))}
    rng.normal(size=(3, 8, 32)).astype(np.float32).tofile(tmp_path / "model.safetensors")
    for residual in (False, True):
        names = [f"layers.0.self_attn.{each}_proj.weight" for each in "kvq"]
        model, plain = (products(names, residual=residual) for _ in range(2))
        for made, form in ((model, "matmul"), (plain, "dequantize")):
            store = Store(form, scheme, form, blocked_matrices(made, scheme, form))
            quantize_graph(made, store)
            with (tmp_path / form).open("wb") as sink:
                store.write(sink.write, tmp_path)
        wanted = run(plain, tmp_path, feeds)
        for name, value in run(model, tmp_path, feeds).items():
            np.testing.assert_allclose(value, wanted[name], atol=2e-5, err_msg=name)
        kinds = [node.op_type for node in model.graph.node]
        assert kinds == (
            ["Concat", "MatMulNBits", "Add", "Split", "MatMulNBits", "Add"]
            if residual
            else ["Concat", "MatMulNBits", "Add", "Split"]
        )
        (whole,) = (each for each in model.graph.initializer if "+" in each.name and "codes" in each.name)
        assert list(whole.dims) == [8 * (2 if residual else 3), 2, 8]


def test_what_only_a_branch_reads_stays() -> None:
    """Rewriting drops initialisers that nothing reads, and a branch of an `If` reads as any node does."""
    model = products(["layers.0.self_attn.k_proj.weight"] * 3, residual=False)
    y = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["r", 8])
    branches = [
        helper.make_graph([helper.make_node("Mul", ["y0", factor], ["z"])], factor, [], [y])
        for factor in ("one", "two")
    ]
    model.graph.node.append(
        helper.make_node("If", ["c"], ["z"], then_branch=branches[0], else_branch=branches[1])
    )
    for number, name in enumerate(("one", "two", "unread")):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, np.float32), name))
    replace_nodes(model.graph, list(model.graph.node))
    names = {tensor.name for tensor in model.graph.initializer}
    assert {"one", "two"} < names and "unread" not in names


def products(names: list[str], *, residual: bool, width: int = 32) -> onnx.ModelProto:
    weights, nodes = [], []
    for number, name in enumerate(names):
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=[8, width])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="model.safetensors")
        tensor.external_data.add(key="offset", value=str(number * 8 * width * 4))
        weights.append(tensor)
        bias = "rows" if residual and number == 2 else f"{name}.bias"
        if bias != "rows":
            weights.append(onnx.numpy_helper.from_array(np.arange(8, dtype=np.float32) + 10 * number, bias))
        nodes.append(helper.make_node("Gemm", ["x", name, bias], [f"y{number}"], transB=1))
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["r", width]),
            helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["r", 8]),
        ],
        [helper.make_tensor_value_info(f"y{n}", onnx.TensorProto.FLOAT, ["r", 8]) for n in range(len(names))],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def run(model: onnx.ModelProto, directory: Path, feeds: dict) -> dict[str, np.ndarray]:
    onnx.save(model, str(directory / "graph.onnx"))
    session = onnxruntime.InferenceSession(directory / "graph.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {each.name: feeds[each.name] for each in session.get_inputs()})
    return dict(zip(names, map(np.asarray, found), strict=True))
