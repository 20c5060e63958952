"""Weights in any of three precisions, and the graph edits for half precision on graphs of a few nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trimvlm.bundle import Dtype
from trimvlm.errors import UserError
from trimvlm_export.passes.bfloat16 import widen
from trimvlm_export.passes.rounded import to_rounded
from trimvlm_export.weights import place

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}
HALVES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def weights(path: Path, dtype: str) -> Path:
    """Tensors of every rank, values from the smallest to large ones, in pieces of odd lengths."""
    generator = torch.Generator().manual_seed(0)
    scales = {"scalar": 3.0, "tiny": 1e-9, "subnormal": 1e-6, "plain": 1.0, "large": 1e3}
    shapes: dict[str, tuple[int, ...]] = {"scalar": (), "tiny": (7,), "subnormal": (33,), "plain": (5, 3)}
    tensors = {
        name: (scale * torch.randn(shapes.get(name, (2, 3, 5)), generator=generator)).to(TORCH[dtype])
        for name, scale in scales.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("source", TORCH)
def test_weights_are_torchs_conversion_bit_by_bit(tmp_path: Path, source: str, dtype: Dtype) -> None:
    file = weights(tmp_path / "model.safetensors", source)
    (tmp_path / "bundle").mkdir()
    placed = place(file, tmp_path / "bundle", dtype)
    assert placed.samefile(file) == (source == dtype), "linked where nothing is to be converted"
    before, after = load_file(file), load_file(placed)
    assert list(before) == list(after)
    for name, tensor in after.items():
        wanted = before[name].to(TORCH[dtype])
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape
        assert torch.equal(tensor.view(BITS[dtype]), wanted.view(BITS[dtype]))


@pytest.mark.parametrize(
    ("source", "value", "dtype", "message"),
    [
        ("float32", 7e4, "float16", "float16 cannot hold; export in bfloat16 or float32"),
        ("bfloat16", -1e6, "float16", "float16 cannot hold; export in bfloat16 or float32"),
        ("float32", 3.4e38, "bfloat16", "bfloat16 cannot hold; export in float32"),
        ("bfloat16", float("inf"), "float32", "not finite; the checkpoint is damaged"),
        ("float32", float("nan"), "bfloat16", "not finite; the checkpoint is damaged"),
    ],
)
def test_values_that_a_precision_cannot_hold(
    tmp_path: Path, source: str, value: float, dtype: Dtype, message: str
) -> None:
    file, out = tmp_path / "model.safetensors", tmp_path / "bundle"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, value]).to(TORCH[source])}, file)
    out.mkdir()
    with pytest.raises(UserError, match=rf"model\.safetensors: bad has values that .*{message}"):
        place(file, out, dtype)
    assert not list(out.iterdir()), "nothing half-written"


def test_what_one_precision_cannot_hold_another_can(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.tensor([7e4, 1e38, 65504.0])}, file)
    found = load_file(place(file, tmp_path / "bundle", "bfloat16"))["x"]
    assert found.tolist() == [70144.0, torch.tensor(1e38).bfloat16().item(), 65536.0]


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list],
    output: list,
    *,
    kind: int,
    opset: int,
    constants: dict[str, np.ndarray] | None = None,
) -> ir.Model:
    """A graph in half precision from `inputs` to `out`."""
    stored: dict[int, Any] = {TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("out", kind, output)],
        [numpy_helper.from_array(a.astype(stored[kind]), name) for name, a in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, **feeds: Any) -> torch.Tensor:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, feeds)[0]))


def spread(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_graph_is_what_torch_computes_in_that_precision(dtype: str) -> None:
    """Values that are only moved are rounded once; sums and products each once."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["product"]),
        helper.make_node("Concat", ["product", "x"], ["both"], axis=0),
        helper.make_node("Add", ["both", "both"], ["twice"]),
        helper.make_node("Sub", ["twice", "w"], ["less"]),
        helper.make_node("Cast", ["less"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Exp", ["wide"], ["power"]),
        helper.make_node("Cast", ["power"], ["out"], to=HALVES[dtype]),
    ]
    x, w = spread(4, 5), spread(5, seed=1)
    model = model_of(nodes, {"x": [4, 5]}, [8, 5], kind=HALVES[dtype], opset=18, constants={"w": w})
    a, b = (torch.from_numpy(array).to(TORCH[dtype]) for array in (x, w))
    both = torch.cat((a * b, a))
    wanted = (both + both - b).float().exp().to(TORCH[dtype])
    found = run(to_rounded(model), x=x)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted.float())
    assert np.abs(found.numpy() - np.exp(2 * np.concatenate((x * w, x)) - w)).max() > 1e-3, "rounded"


def test_operators_without_bfloat16_compute_in_float32() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("AveragePool", ["y"], ["z"], kernel_shape=[2, 2]),
        helper.make_node("Add", ["z", "z"], ["out"]),
    ]
    x, w, b = spread(1, 3, 8, 8), spread(4, 3, 2, 2, seed=1), spread(4, seed=2)
    model = model_of(
        nodes,
        {"x": [1, 3, 8, 8]},
        [1, 4, 3, 3],
        kind=TensorProto.BFLOAT16,
        opset=18,
        constants={"w": w, "b": b},
    )
    with pytest.raises(onnx.shape_inference.InferenceError, match="bfloat16"):
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    widened = widen(model)
    kinds = [node.op_type for node in widened.graph]
    assert kinds == [*["Cast"] * 3, "Conv", "Cast", "Cast", "AveragePool", "Cast", "Add"]
    onnx.checker.check_model(ir.to_proto(widened), full_check=True)
    tx, tw, tb = (torch.from_numpy(array).bfloat16().float() for array in (x, w, b))
    wanted = F.avg_pool2d(F.conv2d(tx, tw, tb, stride=2).bfloat16().float(), 2, stride=1).bfloat16()
    found = run(to_rounded(widened), x=x)
    np.testing.assert_allclose(found, (wanted + wanted).float(), rtol=2**-7)  # one rounding either way


def test_other_graphs_stay_as_they_are() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["out"])
    for kind, opset in ((TensorProto.FLOAT16, 18), (TensorProto.BFLOAT16, 22)):
        model = model_of(
            [node],
            {"x": [1, 3, 4, 4]},
            [1, 2, 3, 3],
            kind=kind,
            opset=opset,
            constants={"w": spread(2, 3, 2, 2)},
        )
        assert [each.op_type for each in widen(model).graph] == ["Conv"]
