"""Tracing a deep decoder by its different layers: of a run of layers that the Schedule treats alike the last
is traced, and the nodes that are its own are repeated for those before it.

Tracing takes half a second per layer and more, copying nodes none. What a run shares (rotary tables, masks)
stays as it is; the copies repeat what follows from the residual stream and from a layer's weights and past,
with their own. Where the traced graph does not look so (the exporter merges equal weights), the decoder is
traced whole.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import msgspec
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from torch import Tensor, nn

from trimvlm.schedule import Row, Schedule
from trimvlm_export.decoder import Decoder
from trimvlm_export.decoder_run import Run
from trimvlm_export.decoder_stream import Stream
from trimvlm_export.graph_io import decoder_example, decoder_inputs, decoder_outputs, is_dynamic
from trimvlm_export.layer_copies import LAYER, Layer, rename
from trimvlm_export.operators import OPSET
from trimvlm_export.trace import trace


def trace_decoder(module: Decoder, *, dtype: torch.dtype) -> ir.Model:
    """The decoder's graph, with the inputs and outputs of `trimvlm_export.graph_io`.

    Args:
        module: with its weights.
        dtype: of the weights.
    """
    runs = runs_of(module.schedule)
    if len(runs) < len(module.schedule.rows):
        model = _trace(_Shortened(module, runs), dtype, entered=len(runs))
        if _expand(model, module, runs):
            return model
    return _trace(module, dtype)


def runs_of(schedule: Schedule) -> list[list[int]]:
    """All layers in runs of those that are alike, ascending. What changes the rows begins a run; a layer that
    also selects or skips is one of its own, and so is the last, which goes on with one row."""
    runs: list[list[int]] = []
    alone = True
    for row in schedule.rows:
        changes = row.layer in (schedule.inject, schedule.exit, schedule.model.layers - 1)
        before, alone = alone, bool(row.select) or row.skip_stage or row.execute == "none"
        if before or alone or changes or _kind(row) != _kind(schedule.rows[row.layer - 1]):
            runs.append([])
        runs[-1].append(row.layer)
    return runs


def _kind(row: Row) -> Row:
    return msgspec.structs.replace(row, layer=0, select=None, skip_stage=False)


class _Shortened(nn.Module):
    """The last layer of each run; also gives the residual streams before and after each of them."""

    def __init__(self, whole: Decoder, runs: Sequence[Sequence[int]]) -> None:
        super().__init__()
        schedule, number = whole.schedule, {layer: n for n, run in enumerate(runs) for layer in run}
        kept = [run[-1] for run in runs]
        self.schedule = msgspec.structs.replace(
            schedule,
            model=msgspec.structs.replace(schedule.model, layers=len(kept)),
            rows=tuple(msgspec.structs.replace(schedule.rows[n], layer=number[n]) for n in kept),
            inject=number[schedule.inject],
            exit=number.get(schedule.exit, len(kept)),
        )
        short = copy.copy(whole)
        short._modules = {**whole._modules, "layers": nn.ModuleList(whole.layers[n] for n in kept)}
        short.schedule = self.schedule
        short._layer = self._record  # type: ignore[method-assign]
        self.decoder, self.filled = short, whole.filled
        self.streams: list[Tensor] = []

    @functools.wraps(Decoder.forward)  # torch.export asks for the names of the arguments
    def forward(self, **inputs: Any) -> tuple[Any, ...]:
        self.streams = []
        return (*self.decoder(**inputs), self.streams)

    def _record(self, row: Row, stream: Stream, run: Run) -> Stream:
        after = Decoder._layer(self.decoder, row, stream, run)
        self.streams += [stream.hidden, after.hidden]
        return after


def _trace(module: Any, dtype: torch.dtype, entered: int = 0) -> ir.Model:
    schedule, filled = module.schedule, bool(module.filled)
    streams = [f"{place}.{n}" for n in range(entered) for place in ("before", "after")]
    model = trace(
        module,
        decoder_example(schedule, dtype=dtype, filled=filled),
        is_dynamic,
        inputs=decoder_inputs(schedule, filled),
        outputs={**decoder_outputs(schedule), **dict.fromkeys(streams)},
        opset=OPSET,
    )
    rename(model.graph, lambda name: name.removeprefix("decoder."))
    return model


def _expand(model: ir.Model, module: Decoder, runs: Sequence[Sequence[int]]) -> bool:
    """Repeats layers in place; False, and the graph is of no use, where it does not look as it should."""
    graph = model.graph
    inputs, outputs = decoder_inputs(module.schedule, bool(module.filled)), decoder_outputs(module.schedule)
    ports = {str(value.name): value for value in [*graph.inputs, *graph.outputs]}
    for value in graph.outputs[-2 * len(runs) :]:
        producer = value.producer()
        if producer is not None and producer.op_type == "Identity":  # one stream is two of the outputs
            ports[str(value.name)] = producer.inputs[0] or value
    repeated = {number: run for number, run in enumerate(runs) if len(run) > 1}
    layers = {number: Layer.of(graph, ports, number) for number in repeated}
    if not all(layers[n].reads == _reads(module, run[-1]) for n, run in repeated.items()):
        return False
    rename(graph, lambda name: LAYER.sub(lambda found: f"{found[1]}{runs[int(found[2])][-1]}", name))
    made: dict[str, ir.Value] = {}
    for number, run in repeated.items():
        before = layers[number].before
        for copied in run[:-1]:
            before = layers[number].copy(graph, before, run[-1], copied, made)
        layers[number].follow(before)
    ports = {str(value.name): value for value in [*graph.inputs, *graph.outputs]} | made
    graph.inputs[:] = [_shaped(ports[name], dims) for name, dims in inputs.items()]
    graph.outputs[:] = [_shaped(ports[name], dims) for name, dims in outputs.items()]
    graph.sort()
    passes.IdentityEliminationPass()(model)  # where two layers have one stream between them
    passes.RemoveUnusedNodesPass()(model)
    return True


def _reads(module: Decoder, number: int) -> list[str]:
    """Names of the weights that layer `number` reads, without its number, sorted."""
    unused = {"attention": ("mlp.", "post_attention_layernorm."), "ffn": ("self_attn.", "input_layernorm.")}
    never = unused.get(module.schedule.rows[number].sublayers, ())
    return sorted(n for n, _ in module.layers[number].named_parameters() if not n.startswith(never))


def _shaped(value: ir.Value, dims: Sequence[str | int]) -> ir.Value:
    value.shape = ir.Shape(dims)
    return value
