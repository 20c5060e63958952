"""Sizes and FLOPs of graphs, against what ONNX Runtime really gives and what the Schedule says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from method_decisions import METHODS
from onnx import TensorProto, helper

from trimvlm.accounting import left_out, mac2, selection_flops
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm_engines import targets
from trimvlm_engines.fit.graph import Graph
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject

TEXT = 9
REQUEST = Request(images=2, text=TEXT, new_tokens=5)


def subject(exported: Path, method: str, lowering: str = "fused") -> Subject:
    name = {"fused": "ort-cpu", "primitive": "jetson-orin-nano-8gb"}[lowering]
    return Subject.of(Bundle(exported), method, targets.load(name))


def every_value(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """All values of a graph that ONNX Runtime computes, at inputs of zeros and ascending positions."""
    import onnxruntime

    model = onnx.load(str(path))
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name and name not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feeds = {node.name: np.zeros(shapes[node.name], kinds[node.type]) for node in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
@pytest.mark.parametrize("method", ["hidivdrop", "fastv+v-skip"])
def test_values_have_the_shapes_of_onnx_runtime(bundle: Path, method: str, lowering: str) -> None:
    given = subject(bundle, method, lowering)
    graph = given.graphs["decoder"]
    for shapes in (given.first("decoder", REQUEST), given.step(REQUEST, 3)):
        tensors, real = graph.sized(shapes).tensors, every_value(graph.path, shapes)
        found = {name: (tensors[name].shape, tensors[name].bytes) for name in real}
        assert found == {name: (value.shape, value.nbytes) for name, value in real.items()}


def test_a_vision_graph_has_the_shapes_of_onnx_runtime(bundle: Path) -> None:
    given = subject(bundle, "dense")
    shapes = given.first("vision", REQUEST)
    real = every_value(given.graphs["vision"].path, shapes)
    tensors = given.graphs["vision"].sized(shapes).tensors
    assert {name: tensors[name].shape for name in real} == {name: v.shape for name, v in real.items()}


@pytest.mark.parametrize("method", METHODS)
def test_flops_are_those_of_the_schedule_its_scores_and_the_head(exported: Path, method: str) -> None:
    given = subject(exported, method)
    one = Request(images=1, text=TEXT, new_tokens=5)
    found = sum(node.flops for node in given.graphs["decoder"].sized(given.first("decoder", one)).nodes)
    model = given.schedule.model
    layers = (
        mac2(given.schedule, TEXT) + selection_flops(given.schedule, TEXT) - left_out(given.schedule, TEXT)
    )
    said = layers + 2 * model.hidden * model.vocab
    assert found == pytest.approx(said, rel=1e-12 if method in ("dense", "v-skip", "shortv", "vtw") else 0.02)


def test_nodes_belong_to_the_layer_whose_weights_they_follow(exported: Path) -> None:
    given = subject(exported, "dense")
    nodes = given.graphs["decoder"].sized(given.first("decoder", REQUEST)).nodes
    assert [node.layer for node in nodes if node.op == "Attention"] == list(range(5))
    assert nodes[-1].layer is None  # the language model head


def test_weights_are_counted_once_however_many_names_they_have(exported: Path) -> None:
    graph = subject(exported, "dense").graphs["decoder"]
    bundle = Bundle(exported)
    (file,) = bundle.manifest.weights
    assert 0.5 * bundle.manifest.files[file].bytes < graph.weight_bytes < bundle.manifest.files[file].bytes
    assert [name for name, weight in graph.weights.items() if weight.looked_up] == ["embed_tokens.weight"]
    twice = {**graph.weights, "again": graph.weights["lm_head.weight"]}
    graph.weights, before = twice, graph.weight_bytes
    try:
        assert graph.weight_bytes == before
    finally:
        del twice["again"]


def test_floats_can_be_counted_as_narrower(exported: Path) -> None:
    given = subject(exported, "dense")
    wide = given.graphs["decoder"]
    narrow = Graph(wide.path, float_bytes=2)
    assert 2 * narrow.weight_bytes == wide.weight_bytes
    shapes = given.first("decoder", REQUEST)
    a, b = wide.sized(shapes).tensors, narrow.sized(shapes).tensors
    assert 2 * b["logits"].bytes == a["logits"].bytes and b["input_ids"].bytes == a["input_ids"].bytes


def test_a_size_that_depends_on_what_values_are_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows"])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [1, None])
    made = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"], "which")], "one", [x], [y])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "g.onnx")
    with pytest.raises(UserError, match=r"g\.onnx: NonZero which: its size does not follow"):
        Graph(tmp_path / "g.onnx").sized({"x": (5,)})


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"\x00\xffnot protobuf")
    with pytest.raises(UserError, match="not an ONNX graph"):
        Graph(tmp_path / "g.onnx")
