"""Filled decoders compute what ordinary ones do, and have no empty tensor, in any run.

Every method's module runs in eager torch, where nothing that it computes may be empty. Exported graphs run
with every intermediate value as an output: two with a bit of everything between them, and as many of the
methods as `TRIMVLM_GRAPHS` says (half a minute each).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from method_decisions import METHODS, MORE
from operator_list import refused
from schedule_cases import (
    Eager,
    NoEmptyTensors,
    agree,
    answer,
    case_of,
    eager,
    expected,
    in_onnxruntime,
    loaded,
)

from trimvlm.backends import Port
from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import LastRowAttention, RouterScores, TextAttention, ValueInfluence
from trimvlm_export.decoder_graph import export_decoder

GRAPHS = int(os.environ.get("TRIMVLM_GRAPHS", "0"))
OWN = LastRowAttention(attention="own")
ROUTED = {"par": Decisions(select=(Select(layer=0, keep=5, by=RouterScores()),))}
ALL = {**METHODS, **MORE, **ROUTED}
MANY = Decisions(
    mask="post_softmax",
    select=(
        Select(layer=1, keep=9, by=TextAttention()),
        Select(layer=2, keep=6, by=ValueInfluence(threshold=0.05)),
    ),
    skip=SkipMode(stages=(SkipStage(layer=3, count=6),)),  # all of them
    layers=(
        LayerRule(layers=(0,), visual_keys="none"),
        LayerRule(layers=(2,), text_keys="sink"),
        LayerRule(layers=(3,), query="unskipped"),
        LayerRule(layers=(4,), ffn="unskipped"),
    ),
)
LATE = Decisions(
    inject=1,
    exit=4,
    select=(Select(layer=2, keep=8, by=OWN), Select(layer=3, keep=1, by=OWN)),
    layers=(LayerRule(layers=(4,), execute="decode"), LayerRule(layers=(3,), cache="none", query="none")),
)
RUNS = [1, 0]  # images in the prompt


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("images", RUNS)
@pytest.mark.parametrize("name", ALL)
def test_every_method(checkpoints: Path, name: str, images: int) -> None:
    _, spec, source = loaded(checkpoints, "mha")
    case = case_of(5, spec, ALL[name], images)
    agree(eager(case, source, filled=True), eager(case, source))
    if list(ALL).index(name) < GRAPHS and images:
        files = export_decoder(source, name, case.schedule, filled=True)
        no_value_is_empty([source.out / file for file in files.values()], spec, ALL[name])


def test_an_ordinary_decoder_has_empty_tensors(checkpoints: Path) -> None:
    """So what proves that there are none would find one."""
    _, spec, source = loaded(checkpoints, "mha")
    case = case_of(5, spec, METHODS["fastv"])
    ordinary = Eager(source, case.schedule, filled=False)
    with pytest.raises(AssertionError), NoEmptyTensors():
        answer(ordinary, case)


@pytest.mark.parametrize(("model", "decisions"), [("gqa-bias-tied", MANY), ("mrope", LATE)])
def test_graphs(checkpoints: Path, model: str, decisions: Decisions) -> None:
    reference, spec, source = loaded(checkpoints, model)
    case = case_of(1, spec, decisions)
    files = [
        source.out / file for file in export_decoder(source, "graph", case.schedule, filled=True).values()
    ]
    theirs = expected(case, reference)
    for file in files:
        agree(in_onnxruntime(file, case), theirs)
        assert ("primitive" not in file.name) or refused(file) == []
    no_value_is_empty(files, spec, decisions)


def no_value_is_empty(files: Iterable[Path], spec: ModelSpec, decisions: Decisions) -> None:
    """Runs graphs on a prompt with an image and on one without, and three decode steps of each."""
    for file in files:
        backend = EveryValue(file)
        for images in RUNS:
            answer(backend, case_of(1, spec, decisions, images))


class EveryValue:
    """A graph as a backend that asserts that no value in it is empty, constants included."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(str(file), load_external_data=False)
        self.names = [value.name for value in model.graph.output]
        constants = [*model.graph.initializer]
        for node in model.graph.node:
            constants += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
            model.graph.output.extend(
                onnx.ValueInfoProto(name=name) for name in node.output if name not in self.names
            )
        assert all(0 not in tensor.dims for tensor in constants)
        open_ = file.with_suffix(".every.onnx")
        onnx.save(model, str(open_))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(open_, options, providers=["CPUExecutionProvider"])
        with open_backend({"decoder": file}) as backend:
            self.ports = backend.inputs("decoder")

    def inputs(self, role: str) -> dict[str, Port]:
        return self.ports

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str]
    ) -> dict[str, np.ndarray]:
        found = self.session.run(None, dict(feeds))
        values = dict(zip([node.name for node in self.session.get_outputs()], found, strict=True))
        assert all(array.size for array in feeds.values())
        assert not [name for name, array in values.items() if not array.size]
        assert len(values) > 2 * len(self.names)
        return {name: values[name] for name in self.names}
