"""Each graph edit on a graph of a few nodes, against ONNX Runtime's own operators."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from trimvlm_export.passes.primitive import OPSET, to_primitive

FLOAT, BOOL, HALF = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.FLOAT16


def model_of(node: onnx.NodeProto, inputs: dict[str, tuple[int, list]], output: list) -> ir.Model:
    graph = helper.make_graph(
        [node, helper.make_node("Identity", ["y"], ["out"])],
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("out", next(iter(inputs.values()))[0], output)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, feeds)[0])


def same(model: ir.Model, feeds: dict[str, np.ndarray], fused: str, atol: float = 2e-6) -> None:
    wanted = run(model, feeds)
    primitive = to_primitive(model)
    assert fused not in {node.op_type for node in primitive.graph}
    assert primitive.opset_imports[""] == OPSET
    onnx.checker.check_model(ir.to_proto(primitive))
    np.testing.assert_allclose(run(primitive, feeds), wanted, atol=atol)


def test_rms_norm() -> None:
    rng = np.random.default_rng(0)
    node = helper.make_node("RMSNormalization", ["x", "w"], ["y"], epsilon=1e-3, axis=-1, stash_type=1)
    model = model_of(node, {"x": (FLOAT, ["r", 8]), "w": (FLOAT, [8])}, ["r", 8])
    feeds = {"x": rng.normal(size=(5, 8)).astype(np.float32), "w": rng.normal(size=8).astype(np.float32)}
    same(model, feeds, "RMSNormalization")


def test_rope() -> None:
    rng = np.random.default_rng(1)
    node = helper.make_node("RotaryEmbedding", ["x", "cos", "sin"], ["y"])
    table = (FLOAT, [1, "r", 4])
    model = model_of(node, {"x": (FLOAT, [1, 3, "r", 8]), "cos": table, "sin": table}, [1, 3, "r", 8])
    angles = rng.normal(size=(1, 5, 4))
    feeds = {
        "x": rng.normal(size=(1, 3, 5, 8)).astype(np.float32),
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    same(model, feeds, "RotaryEmbedding")


@pytest.mark.parametrize(("groups", "scale"), [(4, {"scale": 0.3}), (2, {}), (1, {"scale": 0.1})])
def test_attention(groups: int, scale: dict) -> None:
    rng = np.random.default_rng(2)
    node = helper.make_node("Attention", ["x", "k", "v", "mask"], ["y"], **scale)
    kv = (FLOAT, [1, groups, "s", 8])
    inputs = {"x": (FLOAT, [1, 4, "r", 8]), "k": kv, "v": kv, "mask": (BOOL, ["r", "s"])}
    model = model_of(node, inputs, [1, 4, "r", 8])
    visible = rng.random((5, 7)) < 0.5
    visible[:, 0] = True
    feeds = {
        "x": rng.normal(size=(1, 4, 5, 8)).astype(np.float32),
        "k": rng.normal(size=(1, groups, 7, 8)).astype(np.float32),
        "v": rng.normal(size=(1, groups, 7, 8)).astype(np.float32),
        "mask": visible,
    }
    same(model, feeds, "Attention")


@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_of_integers(keepdims: int) -> None:
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=keepdims)
    inputs = {"x": (TensorProto.INT64, ["r", "c"]), "axes": (TensorProto.INT64, [1])}
    model = model_of(node, inputs, ["r", 1] if keepdims else ["r"])
    x = np.random.default_rng(3).integers(-1000, 1000, (4, 600))
    same(model, {"x": x, "axes": np.array([1])}, "Attention", atol=0)
    assert [node.op_type for node in model.graph] == ["Cast", "ReduceSum", "Cast", "Identity"]


def test_sums_of_floats_stay() -> None:
    node = helper.make_node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)
    model = model_of(node, {"x": (FLOAT, ["r", "c"]), "axes": (TensorProto.INT64, [1])}, ["r"])
    assert [node.op_type for node in to_primitive(model).graph] == ["ReduceSum", "Identity"]
