"""Tracing a deep decoder by its different layers: of a run of layers that the Schedule treats alike, the
first and the last are traced, and the graph's nodes of the last are repeated for those between.

Tracing takes a second per layer, copying nodes none. The first layer of a run makes what its rows share
(rotary tables, masks); the last has nothing in it but its own work, which the copies repeat with their own
weights, past and present. Where the traced graph does not look so (the exporter may merge equal weights of
two layers), the decoder is traced whole.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    kept, runs = shortened(module.schedule)
    if runs:
        model = _trace(_Shortened(module, kept), dtype, hidden=len(kept))
        if _expand(model, module.schedule, kept, runs):
            return model
    return _trace(module, dtype)


@dataclass(frozen=True)
class _Repeat:
    """A run of layers: positions of the first and the last among the traced ones, and the layers between."""

    first: int
    last: int
    between: tuple[int, ...]


def shortened(schedule: Schedule) -> tuple[list[int], list[_Repeat]]:
    """Layers to trace, ascending, and the runs that miss some."""
    kept: list[int] = []
    runs: list[_Repeat] = []
    for run in _runs(schedule):
        kept.append(run[0])
        if len(run) > 1:
            kept.append(run[-1])
        if len(run) > 2:
            runs.append(_Repeat(len(kept) - 2, len(kept) - 1, tuple(run[1:-1])))
    return kept, runs


def _runs(schedule: Schedule) -> Iterable[list[int]]:
    run: list[int] = []
    for row in schedule.rows:
        before = schedule.rows[row.layer - 1]
        event = row.select or row.skip_stage or row.layer in (schedule.inject, schedule.exit)
        if run and (event or row.execute == "none" or _kind(row) != _kind(before)):
            yield run
            run = []
        run.append(row.layer)
        if row.select or row.execute == "none":
            yield run
            run = []
    if run:
        yield run


def _kind(row: Row) -> Row:
    return msgspec.structs.replace(row, layer=0, select=None, skip_stage=False)


class _Shortened(nn.Module):
    """Some layers of a decoder; also gives the residual stream after each of them."""

    def __init__(self, whole: Decoder, kept: Sequence[int]) -> None:
        super().__init__()
        schedule, number = whole.schedule, {layer: position for position, layer in enumerate(kept)}
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
        self.decoder = short
        self.hidden: list[Tensor] = []

    @functools.wraps(Decoder.forward)  # torch.export asks for the names of the arguments
    def forward(self, **inputs: Any) -> tuple[Any, ...]:
        self.hidden = []
        return (*self.decoder(**inputs), self.hidden)

    def _record(self, row: Row, stream: Stream, run: Run) -> Stream:
        after = Decoder._layer(self.decoder, row, stream, run)
        self.hidden.append(after.hidden)
        return after


def _trace(module: Any, dtype: torch.dtype, hidden: int = 0) -> ir.Model:
    schedule = module.schedule
    model = trace(
        module,
        decoder_example(schedule, dtype=dtype),
        is_dynamic,
        inputs=decoder_inputs(schedule),
        outputs={**decoder_outputs(schedule), **{f"hidden.{n}": None for n in range(hidden)}},
        opset=OPSET,
    )
    rename(model.graph, lambda name: name.removeprefix("decoder."))
    return model


def _expand(model: ir.Model, schedule: Schedule, kept: Sequence[int], runs: Sequence[_Repeat]) -> bool:
    """Repeats layers in place; False, and the graph is of no use, where it does not look as it should."""
    graph = model.graph
    ports = {str(value.name): value for value in [*graph.inputs, *graph.outputs]}
    hidden = [ports[f"hidden.{n}"] for n in range(len(kept))]
    layers = [Layer.of(graph, ports, hidden, run.first, run.last) for run in runs]
    if not all(layer.as_expected for layer in layers):
        return False
    rename(graph, lambda name: LAYER.sub(lambda found: f"{found[1]}{kept[int(found[2])]}", name))
    made: dict[str, ir.Value] = {}
    for run, layer in zip(runs, layers, strict=True):
        before = hidden[run.first]
        for number in run.between:
            before = layer.copy(graph, before, kept[run.last], number, made)
        layer.follow(before)
    ports = {str(value.name): value for value in [*graph.inputs, *graph.outputs]} | made
    graph.inputs[:] = [_shaped(ports[name], dims) for name, dims in decoder_inputs(schedule).items()]
    graph.outputs[:] = [_shaped(ports[name], dims) for name, dims in decoder_outputs(schedule).items()]
    graph.sort()
    passes.IdentityEliminationPass()(model)  # where two layers have one stream between them
    passes.RemoveUnusedNodesPass()(model)
    return True


def _shaped(value: ir.Value, dims: Sequence[str | int]) -> ir.Value:
    value.shape = ir.Shape(dims)
    return value
