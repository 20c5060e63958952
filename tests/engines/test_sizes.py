"""Sizes of a graph's values, told without running it, are those that it has when it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from trimvlm.bundle import Bundle
from trimvlm.schedule import Schedule
from trimvlm.target import Limits
from trimvlm_engines.shapes import decoder_ranges
from trimvlm_engines.splitting.sizes import sizes_at


def test_sizes_that_a_graph_computes() -> None:
    """A third of the rows, as a selection keeps them: by a division that inference does not do."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Div", ["n", "three"], ["k"]),
        helper.make_node("TopK", ["x", "k"], ["best", "rows"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "third",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["kept", 2]) for name in ("rows",)],
        [numpy_helper.from_array(np.array([3]), "three")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert sizes_at(model, {"x": (7, 2)})["best"] == (TensorProto.FLOAT, (2, 2))
    assert sizes_at(model, {"x": (0, 2)})["rows"] == (TensorProto.INT64, (0, 2))
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["rows", ""]


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
@pytest.mark.parametrize("method", ["dense", "hidivdrop", "fastv+v-skip"])
def test_every_value_of_a_decoder(exported: Path, method: str, lowering: str) -> None:
    bundle = Bundle(exported)
    entry = bundle.manifest.profiles[method]
    graph = bundle.path(entry.decoders[lowering])  # type: ignore[index]
    model = onnx.load(graph, load_external_data=False)
    ranges = decoder_ranges(Schedule.resolve(bundle.profile(method), entry.model), Limits(text=20))
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
    for bound in ("min", "opt", "max"):
        shapes = {name: getattr(shape, bound) for name, shape in ranges.items()}
        told = sizes_at(model, shapes)
        assert {name for node in model.graph.node for name in node.output} <= told.keys()
        feeds = {port.name: np.zeros(shapes[port.name], types[port.type]) for port in session.get_inputs()}
        names = [port.name for port in session.get_outputs()]
        for name, array in zip(names, session.run(names, feeds), strict=True):
            assert told[name].shape == array.shape, (name, bound)
