"""Random cases for a decoder: a prompt, visual rows and a Schedule, and three that compute them.

`expected` is the reference; `eager`, the traced module in torch, and `in_onnxruntime`, an exported graph, go
through the runtime's own loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from random_decisions import random_decisions
from tiny_models import tiny_llava
from tiny_qwen import tiny_qwen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

from trimvlm.backends import Port, check_feeds
from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.decoding import Decoder as GraphDecoder
from trimvlm.decoding import prefill_inputs, step_inputs
from trimvlm.filling import FILLED, POSITIONS
from trimvlm.mrope import Coordinates, coordinates
from trimvlm.profile import Decisions, LayerRule, ModelSpec, Select, SkipMode, SkipStage
from trimvlm.rules import (
    CrossAndSelfAttention,
    RandomOrder,
    RouterScores,
    SelectionRule,
    TextAttention,
    ValueInfluence,
)
from trimvlm.schedule import Schedule, resolve
from trimvlm.text import Prompt
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import decoder_names, export_decoder, make_decoder
from trimvlm_export.graph_io import attending, decoder_inputs, decoder_outputs
from trimvlm_export.reference import Reference
from trimvlm_export.source import Source

TOLERANCE, STEPS, IMAGE, QWEN_IMAGE = 1e-4, (7, 30, 11), 4, 5
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"layers": 5},
    "gqa-bias-tied": {"layers": 5, "kv_heads": 2, "attention_bias": True, "tie": True, "seed": 1},
    "mqa-3-by-3": {"layers": 8, "kv_heads": 1, "image_size": 24, "seed": 2},
    "qwen2": {"layers": 5, "kv_heads": 2, "qwen2": True, "seed": 3},
    "mrope": {"family": "qwen2_5_vl", "layers": 5, "tie": True, "seed": 4},
    "two-layers": {"layers": 2},
}
GRID = (5, 3)  # of the images of a model that has grids


@dataclass(frozen=True)
class Case:
    """What one random number makes: a prompt, the rows of its images, and a Schedule."""

    schedule: Schedule
    ids: np.ndarray
    prompt: Prompt
    visual: torch.Tensor
    router: np.ndarray


@cache
def loaded(directory: Path, name: str) -> tuple[Any, ModelSpec, Source]:
    make, grid = (tiny_qwen, GRID) if "family" in MODELS[name] else (tiny_llava, None)
    path = make(directory / name, **MODELS[name])
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, model_spec(path, grid), Source.place(path, directory / f"{name}-bundle", "float32")


def case_of(
    number: int, spec: ModelSpec, decisions: Decisions | None = None, images: int | None = None
) -> Case:
    """What follows from a number; without `decisions` or `images` these do too."""
    random = Random(number)
    schedule = resolve(random_decisions(random, spec) if decisions is None else decisions, spec)
    token, least = (QWEN_IMAGE, 1) if spec.mrope else (IMAGE, 0)
    image = [token] * schedule.visual_tokens
    ids = [random.randrange(7, 60) for _ in range(random.randint(0, 3))]  # the image may come first
    for _ in range(random.randint(1, 2) if images is None else images):
        ids += image + [random.randrange(7, 60) for _ in range(random.randint(least, 2))]
    ids += [random.randrange(7, 60) for _ in range(random.randint(1, 6))]
    ids_S = np.array(ids)
    is_image = ids_S == token
    generator = torch.Generator().manual_seed(number)
    places = np.arange(len(ids))
    return Case(
        schedule,
        ids_S,
        Prompt(
            input_ids=ids_S[~is_image],
            text_positions=places[~is_image],
            visual_positions=places[is_image],
        ),
        torch.randn(int(is_image.sum()), spec.hidden, generator=generator),
        np.random.default_rng(number).random(int(is_image.sum()), np.float32),
    )


class Eager:
    """The traced module in torch as a backend (`trimvlm.backends.Backend`)."""

    def __init__(self, source: Source, schedule: Schedule, *, filled: bool) -> None:
        self.schedule, self.filled = schedule, filled
        self.module = make_decoder(source.config, schedule, filled=filled)
        source.load(self.module, decoder_names(source.family, source.config, self.module))

    def inputs(self, role: str) -> dict[str, Port]:
        dtypes: dict[str, str] = dict.fromkeys(("visual", "router_scores", "past_key", "past_value"), "f4")
        dtypes["past_visible"] = "?"
        return {
            name: Port(
                np.dtype(
                    "?" if name.startswith("past_visible") else dtypes.get(name.partition(".")[0], "i8")
                ),
                tuple(size if isinstance(size, int) else None for size in dims),
            )
            for name, dims in decoder_inputs(self.schedule, self.filled).items()
        }

    def run(
        self, role: str, feeds: dict[str, np.ndarray], fetch: Sequence[str], keep: Sequence[str]
    ) -> dict[str, np.ndarray]:
        check_feeds(self.inputs(role), feeds)
        given: dict[str, Any] = {"forced": [], "forced_skip": [], "past_visible": []}
        for port in self.inputs(role):
            value = torch.from_numpy(np.ascontiguousarray(feeds[port]))
            name, numbered, _ = port.partition(".")
            if numbered:
                given.setdefault(name, []).append(value)
            else:
                given[POSITIONS if name == FILLED else name] = value
        with NoEmptyTensors() if self.filled else nullcontext(), torch.no_grad():
            out = self.module(**given)
        tensors = [out.logits, *(tensor for part in out[1:] for tensor in part)]
        return {n: t.numpy() for n, t in zip(decoder_outputs(self.schedule), tensors, strict=True)}


class NoEmptyTensors(TorchDispatchMode):
    """Asserts that nothing computed is empty, but for constants that no graph has."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        constant = func is torch.ops.aten.empty.memory_format or (
            func is torch.ops.aten.slice.Tensor and args[1:] == (0, 0, 0)
        )
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            assert constant or not isinstance(tensor, torch.Tensor) or tensor.numel(), (func, args)
        return out


def eager(case: Case, source: Source, *, filled: bool = False) -> list[dict[str, np.ndarray]]:
    """Outputs of prefill and decode steps of the module in torch, by the graph's names."""
    return answer(Eager(source, case.schedule, filled=filled), case)


def in_onnxruntime(graph: Path, case: Case) -> list[dict[str, np.ndarray]]:
    """The same of an exported graph."""
    with open_backend({"decoder": graph}, threads=1) as backend:
        return answer(backend, case)


def answer(backend: Any, case: Case) -> list[dict[str, np.ndarray]]:
    """The runtime's own loop."""
    runs = []
    decoder = GraphDecoder(backend, list(decoder_outputs(case.schedule)))
    places = places_of(case)
    inputs = prefill_inputs(case.prompt, case.visual.numpy(), places=places, router_scores=case.router)
    wanted = {POSITIONS if name == FILLED else name for name in backend.inputs("decoder")}
    runs.append(decoder({name: value for name, value in inputs.items() if name in wanted}))
    for step, token in enumerate(STEPS):
        position, lag = case.prompt.length + step, places.lag if places else None
        runs.append(decoder(step_inputs(token, position, runs[-1], lag=lag)))
    return runs


def places_of(case: Case) -> Coordinates | None:
    model = case.schedule.model
    return coordinates(case.prompt, GRID, full=model.visual_tokens) if model.mrope else None


def close(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.shape == theirs.shape, name
    np.testing.assert_allclose(
        ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, np.abs(theirs).max(initial=0)), err_msg=name
    )


def expected(case: Case, model: Any) -> list[dict[str, np.ndarray]]:
    """The same of the reference; decode steps have logits alone."""
    schedule = case.schedule
    inputs = {
        "input_ids": torch.from_numpy(case.ids)[None],
        "attention_mask": torch.ones(1, len(case.ids), dtype=torch.long),
    }
    if schedule.model.mrope:
        images = len(case.visual) // schedule.visual_tokens
        inputs["image_grid_thw"] = torch.tensor([[1, 2 * GRID[0], 2 * GRID[1]]] * images)
    router = case.router if "router_scores" in decoder_inputs(schedule) else None
    with Reference(model, schedule) as reference, torch.no_grad():
        run = reference.prefill(inputs, features=case.visual, router_scores=router)
        first: dict[str, Any] = {"logits": run.logits[None]}
        for row in attending(schedule):
            pair = run.kv[row.layer]
            assert pair is not None
            first[f"present_key.{row.layer}"], first[f"present_value.{row.layer}"] = pair
        first |= {f"present_visible.{stage}": run.visible[stage] for stage in schedule.masks}
        for name in ("selected", "scores", "skipped", "skip_scores"):
            first |= {f"{name}.{stage}": array for stage, array in enumerate(getattr(run, name))}
        return [first, *({"logits": reference.step(token)[None]} for token in STEPS)]


def agree(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert set(ours[0]) == set(theirs[0])
    for name in sorted(theirs[0], key=lambda name: not name.startswith(("sel", "ski", "sco"))):
        array = np.asarray(theirs[0][name])
        if array.dtype.kind in "ib":
            assert ours[0][name].tolist() == array.tolist(), name
        else:
            close(ours[0][name], array, name)
    for step, (our, their) in enumerate(zip(ours[1:], theirs[1:], strict=True)):
        close(our["logits"], their["logits"], f"logits of step {step}")


def graphs_agree(case: Case, source: Source, name: str, theirs: list[dict[str, np.ndarray]]) -> None:
    """Of an exported graph in both lowerings."""
    for file in export_decoder(source, name, case.schedule).values():
        agree(in_onnxruntime(source.out / file, case), theirs)


def everything() -> Decisions:
    """A bit of everything, for eight layers and nine visual tokens."""

    def select(layer: int, keep: int, by: SelectionRule) -> Select:
        return Select(layer=layer, keep=keep, by=by)

    return Decisions(
        mask="post_softmax",
        select=(
            select(1, 8, TextAttention()),
            select(2, 7, RandomOrder()),
            select(3, 6, CrossAndSelfAttention()),
            select(4, 5, RouterScores()),
            select(5, 4, ValueInfluence(threshold=0.4)),
        ),
        skip=SkipMode(stages=(SkipStage(layer=6, count=2), SkipStage(layer=7, count=3))),
        layers=(
            LayerRule(layers=(0,), visual_keys="none"),
            LayerRule(layers=(2,), execute="decode"),
            LayerRule(layers=(5,), text_keys="sink"),
            LayerRule(layers=(6,), query="unskipped", ffn="unskipped"),
            LayerRule(layers=(7,), sublayers="ffn", ffn="unskipped"),
        ),
    )
