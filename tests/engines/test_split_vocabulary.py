"""Language model head and embeddings in pieces: the same numbers, from the same bytes of the same file."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from whole_and_split import assert_same_answers

from trimvlm.bundle import Bundle
from trimvlm.schedule import Schedule
from trimvlm.target import Limits
from trimvlm_engines.shapes import decoder_ranges
from trimvlm_engines.splitting import pieces
from trimvlm_engines.splitting.vocabulary import split_vocabulary

V, D = 11, 4


def external(name: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[V, D])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", offset), ("length", V * D * 4)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def small(directory: Path, *, tied: bool) -> onnx.ModelProto:
    """ids -> embeddings -> logits; the weights are numbers from 0 on, after 64 bytes of something else."""
    numbers = np.arange(2 * V * D, dtype=np.float32)
    (directory / "weights").write_bytes(bytes(64) + numbers.tobytes())
    head = "table" if tied else "head"
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Gemm", ["rows", head], ["wide"], transB=1),
        helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["text"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["text", V])],
        [external("table", 64)] + [external("head", 64 + V * D * 4)] * (not tied),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model: onnx.ModelProto, directory: Path, ids: list[int]) -> np.ndarray:
    (directory / "g.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(directory / "g.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {"input_ids": np.array(ids, np.int64)})[0]


@pytest.mark.parametrize("rows", [1, 3, 4, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_every_entry_comes_from_its_piece(tmp_path: Path, tied: bool, rows: int) -> None:
    whole = run(small(tmp_path, tied=tied), tmp_path, list(range(V)))
    model = small(tmp_path, tied=tied)
    assert split_vocabulary(model, rows)
    np.testing.assert_array_equal(run(model, tmp_path, list(range(V))), whole)
    assert run(model, tmp_path, []).shape == (0, V)
    largest = max(tensor.dims[0] for tensor in model.graph.initializer)
    assert largest == rows
    ends = sorted(
        (int(entry["offset"]), int(entry["offset"]) + int(entry["length"]))
        for tensor in model.graph.initializer
        if (entry := {each.key: each.value for each in tensor.external_data})
    )
    matrices = 1 if tied else 2
    assert ends[0][0] == 64 and ends[-1][1] == 64 + matrices * V * D * 4
    assert all(end == start for (_, end), (start, _) in pairwise(ends))


def test_what_is_small_enough_stays(tmp_path: Path) -> None:
    model = small(tmp_path, tied=False)
    before = model.SerializeToString()
    assert not split_vocabulary(model, V)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
@pytest.mark.parametrize("method", ["dense", "hidivdrop"])
def test_decoders_answer_as_before(exported: Path, tmp_path: Path, method: str, lowering: str) -> None:
    bundle = Bundle(exported)
    entry = bundle.manifest.profiles[method]
    graph = bundle.path(entry.decoders[lowering])  # type: ignore[index]

    schedule = Schedule.resolve(bundle.profile(method), entry.model)
    limits = Limits(lm_head_columns=24)
    (piece,) = pieces(graph, limits, decoder_ranges(schedule, limits))
    assert piece.role == "decoder" and piece.how == {"split": {"lm_head_columns": 24}}
    assert_same_answers(graph, [piece], schedule)
    model = onnx.ModelProto.FromString(piece.graph or b"")
    names = {
        tensor.name
        for tensor in model.graph.initializer
        if re.match(r"(lm_head|embed_tokens)\.", tensor.name)
    }
    starts = (0, 24, 48)
    assert names == {f"{matrix}.weight.{start}" for matrix in ("lm_head", "embed_tokens") for start in starts}
