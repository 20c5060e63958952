"""A deep decoder's graph made from few traced layers is the graph of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from decoder_feeds import prefill_feeds
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llava

from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import Schedule, resolve
from trimvlm_export import repeated_layers
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.source import Source
from trimvlm_export.trace import attach_weights, save

LAYERS = 9
BY_ATTENTION = LastRowAttention(attention="previous")
DECISIONS = {
    "runs": Decisions(
        inject=1,
        exit=8,
        select=(Select(layer=4, keep=5, by=BY_ATTENTION),),
        layers=(LayerRule(layers=(5, 6, 7), query="none"),),
    ),
    "holes": Decisions(
        layers=(LayerRule(layers=(3,), execute="none"), LayerRule(layers=(7,), sublayers="ffn"))
    ),
}


def traced(checkpoint: Path, decisions: Decisions, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], bool]:
    """How many layers each trace had, and whether the last graph computes what the whole decoder's does."""
    source = Source.place(checkpoint, checkpoint.parent / "bundle", "float32")
    schedule = resolve(decisions, model_spec(checkpoint))
    module = make_decoder(source.config, schedule)
    weights = source.load(module, decoder_names(source.family, source.config, module))
    layers: list[int] = []
    trace = repeated_layers.trace

    def counting(module: Any, *args: Any, **options: Any) -> ir.Model:
        layers.append(len(module.schedule.rows))
        return trace(module, *args, **options)

    monkeypatch.setattr(repeated_layers, "trace", counting)
    ours = repeated_layers.trace_decoder(module, dtype=torch.float32)
    monkeypatch.setattr(repeated_layers, "runs_of", lambda schedule: [[row.layer] for row in schedule.rows])
    theirs = repeated_layers.trace_decoder(module, dtype=torch.float32)
    assert layers.pop() == LAYERS
    assert len(list(ours.graph)) == len(list(theirs.graph))
    found = []
    for model in (ours, theirs):
        attach_weights(model, weights, source.out)
        save(model, source.out / "decoder.onnx")
        found.append(run(source.out / "decoder.onnx", schedule))
    assert list(found[0]) == list(found[1])
    return layers, all(np.array_equal(found[0][name], value) for name, value in found[1].items())


def run(graph: Path, schedule: Schedule) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    feeds = prefill_feeds(schedule, text=6, before_image=2)
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {each.name: feeds[each.name] for each in session.get_inputs()})
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


@pytest.mark.parametrize(("name", "layers"), [("runs", 5), ("holes", 5)])
def test_the_graph_is_that_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layers: int
) -> None:
    checkpoint = tiny_llava(tmp_path / "model", layers=LAYERS, kv_heads=2)
    assert traced(checkpoint, DECISIONS[name], monkeypatch) == ([layers], True)


@pytest.mark.parametrize(
    ("equal", "layers"),
    [
        (("7.input_layernorm", "7.post_attention_layernorm"), [2, LAYERS]),  # the exporter keeps one of them
        (("0.input_layernorm", "7.input_layernorm"), [2]),
    ],
)
def test_equal_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: tuple[str, str], layers: list[int]
) -> None:
    checkpoint = tiny_llava(tmp_path / "model", layers=LAYERS)
    (file,) = checkpoint.glob("*.safetensors")
    tensors = load_file(file)
    one, other = (next(n for n in tensors if n.endswith(f"layers.{name}.weight")) for name in equal)
    save_file(tensors | {one: tensors[other].clone()}, file, {"format": "pt"})
    assert traced(checkpoint, Decisions(), monkeypatch) == (layers, True)
