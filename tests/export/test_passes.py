"""Each graph edit on a graph of a few nodes, against ONNX Runtime's own operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.traversal import RecursiveGraphIterator

from trimvlm_export.passes.gelu import halve_inputs
from trimvlm_export.passes.primitive import OPSET, to_primitive
from trimvlm_export.passes.residual import add_in_products
from trimvlm_export.passes.scaled import scale_queries

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


def residual_model(*, bias: bool = False, twice: bool = False, width: int = 5, beta: float = 1.0) -> ir.Model:
    rng = np.random.default_rng(4)
    arrays = {"w": rng.normal(size=(5, 3)), "b": rng.normal(size=5)}
    weights = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in arrays.items()]
    gemm = helper.make_node("Gemm", ["x", "w", "b"][: 3 if bias else 2], ["product"], transB=1, beta=beta)
    nodes = [gemm, helper.make_node("Add", ["r", "product"], ["y"])]
    nodes += [helper.make_node("Add", ["y", "product"], ["z"])] if twice else []
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, ["rows", 3]),
        helper.make_tensor_value_info("r", FLOAT, ["rows", width]),
    ]
    outputs = [helper.make_tensor_value_info("z" if twice else "y", FLOAT, ["rows", 5])]
    graph = helper.make_graph(nodes, "residual", inputs, outputs, weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def test_a_product_adds_the_residual() -> None:
    rng, model = np.random.default_rng(5), residual_model()
    feeds = {"x": rng.normal(size=(4, 3)).astype(np.float32), "r": rng.normal(size=(4, 5)).astype(np.float32)}
    before = run(model, feeds)
    assert add_in_products(model) == 1
    (gemm,) = model.graph
    assert [value.name for value in gemm.inputs if value] == ["x", "w", "r"]
    np.testing.assert_allclose(run(model, feeds), before, atol=2e-6)


@pytest.mark.parametrize("other", [{"bias": True}, {"twice": True}, {"width": 1}, {"beta": 0.5}])
def test_other_sums_stay(other: dict) -> None:
    model = residual_model(**other)
    before = [node.op_type for node in model.graph]
    assert add_in_products(model) == 0
    assert [node.op_type for node in model.graph] == before


def attention_model(*, scale: float | None = None, kind: int = FLOAT) -> ir.Model:
    """Attention of q [1, 4, R, 8], in the graph itself, in `pieces.0` and in `whole.0`."""
    attributes = {} if scale is None else {"scale": scale}

    def attention(name: str) -> onnx.NodeProto:
        return helper.make_node("Attention", ["q", "k", "v"], [name], **attributes)

    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}.out", kind, [1, 4, "r", 8])
        return helper.make_graph([attention(f"{name}.out")], name, [], [output])

    nodes = [
        attention("outside"),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("pieces.0"), else_branch=branch("whole.0")),
        helper.make_node("Add", ["outside", "y"], ["out"]),
    ]
    inputs = [helper.make_tensor_value_info(each, kind, [1, 4, "r", 8]) for each in "qkv"]
    inputs.append(helper.make_tensor_value_info("c", BOOL, []))
    outputs = [helper.make_tensor_value_info("out", kind, [1, 4, "r", 8])]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_queries_are_scaled_before_attention_but_not_in_pieces(scale: float | None) -> None:
    rng, model = np.random.default_rng(6), attention_model(scale=scale)
    feeds = {each: rng.normal(size=(1, 4, 5, 8)).astype(np.float32) for each in "qkv"}
    both = [feeds | {"c": np.array(condition)} for condition in (True, False)]
    before = [run(model, each) for each in both]
    assert scale_queries(model) == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    nodes = {str(node.outputs[0].name): node for node in RecursiveGraphIterator(model.graph)}
    scales = {name: nodes[name].attributes.get_float("scale", 0.0) for name in ("outside", "whole.0.out")}
    assert scales == {"outside": 1.0, "whole.0.out": 1.0}
    assert nodes["pieces.0.out"].attributes.get_float("scale", 0.0) == np.float32(scale or 0.0)
    for each, wanted in zip(both, before, strict=True):
        np.testing.assert_allclose(run(model, each), wanted, atol=2e-6)


@pytest.mark.parametrize("model", [attention_model(scale=1.0), attention_model(kind=HALF)])
def test_queries_that_gain_nothing_stay(model: ir.Model) -> None:
    before = [node.op_type for node in RecursiveGraphIterator(model.graph)]
    assert scale_queries(model) == 0
    assert [node.op_type for node in RecursiveGraphIterator(model.graph)] == before


@pytest.mark.parametrize(("approximate", "fused"), [("none", "Gelu"), ("tanh", "FastGelu")])
def test_gelus_are_found_by_onnx_runtime(approximate: str, fused: str, tmp_path: Path) -> None:
    """As torch exports them they are not, which is why the pass is there; results are the same to the bit."""

    class Activation(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(x.sin(), approximate=approximate).cos()

    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(Activation().eval(), (x,), dynamo=True, opset_version=18, verbose=False)
    assert program is not None
    model, feeds = program.model, {program.model.graph.inputs[0].name: x.numpy()}
    unfused = onnxruntime.SessionOptions()
    unfused.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found, results = [], []
    for changed in (0, 1):
        assert not changed or halve_inputs(model) == 1
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{changed}.onnx")
        data = ir.to_proto(model).SerializeToString()
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found.append({node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node})
        results.append(onnxruntime.InferenceSession(data, unfused).run(None, feeds)[0])
    assert fused not in found[0] and found[1] == {"Sin", fused, "Cos"}
    assert np.array_equal(*results)


def test_other_products_stay() -> None:
    """A half of something else, and a GELU whose half is read twice."""
    nodes = [
        helper.make_node("Erf", ["x"], ["f"]),
        helper.make_node("Add", ["f", "one"], ["rest"]),
        helper.make_node("Mul", ["half", "rest"], ["inner"]),
        helper.make_node("Mul", ["x", "inner"], ["y"]),
        helper.make_node("Mul", ["one", "rest"], ["whole"]),
        helper.make_node("Mul", ["x", "whole"], ["z"]),
        helper.make_node("Sum", ["y", "z", "inner"], ["out"]),
    ]
    values = {"one": 1.0, "half": 0.5}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [3])],
        [helper.make_tensor_value_info("out", FLOAT, [3])],
        [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )
    before = ir.to_proto(model).SerializeToString()
    assert halve_inputs(model) == 0
    assert ir.to_proto(model).SerializeToString() == before
