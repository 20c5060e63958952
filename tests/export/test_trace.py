"""What a trace leaves out changes no graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch
from method_decisions import LAYERS, METHODS
from tiny_models import tiny_llava

from trimvlm.schedule import resolve
from trimvlm_export import trace
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.repeated_layers import trace_decoder
from trimvlm_export.source import Source

# Between them: the operators of `trace.PLAIN`.
PLAIN = ("v-skip", "hidivdrop")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("trace")
    return Source.place(tiny_llava(folder / "model", layers=LAYERS, kv_heads=2), folder / "bundle", "float32")


def decoder(source: Source, name: str, dtype: torch.dtype) -> ir.Model:
    schedule = resolve(METHODS[name], model_spec(source.out.parent / "model"))
    module = make_decoder(source.config, schedule)
    source.load(module, decoder_names(source.family, source.config, module))
    return trace_decoder(module.to(dtype), dtype=dtype)


def content(model: ir.Model) -> list[Any]:
    """Everything in the graph but the names of what is computed within it."""
    known: dict[ir.Value | None, Any] = {None: None}
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        constant = value.const_value
        if constant is None or str(value.name).endswith(("weight", "bias")):
            known[value] = value.name
            continue
        known[value] = (constant.dtype, constant.numpy().tolist())
    nodes = []
    for number, node in enumerate(model.graph):
        attributes = {name: str(each.value) for name, each in node.attributes.items()}
        types = [(value.dtype, _sizes(value)) for value in node.outputs]
        nodes.append((node.op_type, attributes, [known[value] for value in node.inputs], types))
        known.update({value: (number, n) for n, value in enumerate(node.outputs)})
    return [nodes, [(value.name, str(value.shape), known[value]) for value in model.graph.outputs]]


def _sizes(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [n if isinstance(n, int) else None for n in value.shape]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operators_need_no_decomposition(
    source: Source, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trace, "PLAIN", set())
        usual = content(decoder(source, name, torch.float16))

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("decomposed")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    assert content(decoder(source, name, torch.float16)) == usual
