"""The exported decoder computes what the reference computes: two implementations, one Schedule.

Random valid Schedules, with every field of the Schedule in them, on random tiny decoders and random prompts.
Each case runs the traced module in eager torch. Exported graphs run in ONNX Runtime, in both lowerings: one
with a bit of everything, and as many of the random cases as `TRIMVLM_GRAPHS` says (a few seconds each).
`TRIMVLM_SCHEDULES` says how many random cases there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from random_decisions import random_decisions
from tiny_models import tiny_llava
from tiny_qwen import tiny_qwen
from transformers import AutoModelForImageTextToText

from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.decoding import Decoder as GraphDecoder
from trimvlm.decoding import prefill_inputs, step_inputs
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
from trimvlm.schedule import Row, Schedule, resolve
from trimvlm.target import Limits
from trimvlm.text import Prompt
from trimvlm_engines.shapes import decoder_ranges
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.decoder_graph import decoder_names, export_decoder, make_decoder
from trimvlm_export.graph_io import attending, decoder_inputs, decoder_outputs
from trimvlm_export.reference import Reference
from trimvlm_export.source import Source
from trimvlm_tools.bench.feeds import prefill_feeds

SCHEDULES = int(os.environ.get("TRIMVLM_SCHEDULES", "40"))
GRAPHS = int(os.environ.get("TRIMVLM_GRAPHS", "0"))
TOLERANCE, STEPS, IMAGE, QWEN_IMAGE = 1e-4, (7, 30, 11), 4, 5
SPEC = ModelSpec(
    family="llava", layers=5, hidden=64, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=64, visual_tokens=16
)
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


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def loaded(directory: Path, name: str) -> tuple[Any, ModelSpec, Source]:
    make, grid = (tiny_qwen, GRID) if "family" in MODELS[name] else (tiny_llava, None)
    path = make(directory / name, **MODELS[name])
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, model_spec(path, grid), Source.place(path, directory / f"{name}-bundle", "float32")


def case_of(number: int, spec: ModelSpec, decisions: Decisions | None = None) -> Case:
    random = Random(number)
    schedule = resolve(random_decisions(random, spec) if decisions is None else decisions, spec)
    token, least = (QWEN_IMAGE, 1) if spec.mrope else (IMAGE, 0)
    image = [token] * schedule.visual_tokens
    ids = [random.randrange(7, 60) for _ in range(random.randint(0, 3))]  # the image may come first
    for _ in range(random.randint(1, 2)):
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


def eager(case: Case, source: Source) -> list[dict[str, np.ndarray]]:
    """Outputs of prefill and decode steps of the module in torch, by the graph's names."""
    schedule = case.schedule
    module = make_decoder(source.config, schedule)
    source.load(module, decoder_names(source.family, source.config, module))
    none = torch.zeros(0, dtype=torch.long)
    empty = torch.zeros(1, schedule.model.kv_heads, 0, schedule.model.head_dim)
    given: dict[str, Any] = {
        "input_ids": torch.from_numpy(case.prompt.input_ids),
        "visual": case.visual,
        "text_positions": torch.from_numpy(case.prompt.text_positions),
        "visual_positions": torch.from_numpy(case.prompt.visual_positions),
        **coordinates_of(case),
        "router_scores": torch.from_numpy(case.router),
        "forced": [none for _ in schedule.stages],
        "forced_skip": [none for _ in schedule.skip_stages],
        "past_key": [empty for _ in attending(schedule)],
        "past_value": [empty for _ in attending(schedule)],
        "past_visible": [none.bool() for _ in schedule.masks],
    }
    runs = []
    for step in range(len(STEPS) + 1):
        with torch.no_grad():
            out = module(**given)
        tensors = [out.logits, *(tensor for part in out[1:] for tensor in part)]
        runs.append({n: t.numpy() for n, t in zip(decoder_outputs(schedule), tensors, strict=True)})
        if step < len(STEPS):
            given |= {
                "input_ids": torch.tensor([STEPS[step]]),
                "visual": case.visual[:0],
                "text_positions": torch.tensor([case.prompt.length + step]),
                "visual_positions": none,
                **coordinates_of(case, step),
                "router_scores": torch.zeros(0),
                "past_key": out.present_key,
                "past_value": out.present_value,
                "past_visible": out.present_visible,
            }
    return runs


def places_of(case: Case) -> Coordinates | None:
    model = case.schedule.model
    return coordinates(case.prompt, GRID, full=model.visual_tokens) if model.mrope else None


def coordinates_of(case: Case, step: int | None = None) -> dict[str, torch.Tensor]:
    """The module's inputs for M-RoPE, of the prompt or of a decode step."""
    places = places_of(case)
    if places is None:
        return {}
    text, visual = torch.from_numpy(places.text.copy()), torch.from_numpy(places.visual)
    if step is not None:
        text, visual = torch.full((3, 1), case.prompt.length + step - places.lag), visual[:, :0]
    return {"text_coordinates": text, "visual_coordinates": visual}


def in_onnxruntime(graph: Path, case: Case) -> list[dict[str, np.ndarray]]:
    """The same of an exported graph, through the runtime's own loop."""
    names = list(decoder_outputs(case.schedule))
    runs = []
    with open_backend({"decoder": graph}, threads=1) as backend:
        decoder = GraphDecoder(backend, names)
        places = places_of(case)
        inputs = prefill_inputs(case.prompt, case.visual.numpy(), places=places, router_scores=case.router)
        wanted = backend.inputs("decoder")
        runs.append(decoder({name: value for name, value in inputs.items() if name in wanted}))
        for step, token in enumerate(STEPS):
            position, lag = case.prompt.length + step, places.lag if places else None
            runs.append(decoder(step_inputs(token, position, runs[-1], lag=lag)))
    return runs


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
    for file in export_decoder(source, name, case.schedule).values():
        agree(in_onnxruntime(source.out / file, case), theirs)


@pytest.mark.parametrize("number", range(SCHEDULES))
def test_decoder_equals_reference(checkpoints: Path, number: int) -> None:
    model, spec, source = loaded(checkpoints, list(MODELS)[number % 5])
    case = case_of(number, spec)
    theirs = expected(case, model)
    agree(eager(case, source), theirs)
    if number < GRAPHS:
        graphs_agree(case, source, f"case-{number}", theirs)


def select(layer: int, keep: int, by: SelectionRule) -> Select:
    return Select(layer=layer, keep=keep, by=by)


def test_graphs_equal_reference(checkpoints: Path) -> None:
    decisions = Decisions(
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
    model, spec, source = loaded(checkpoints, "mqa-3-by-3")
    case = case_of(1, spec, decisions)
    theirs = expected(case, model)
    assert not all(theirs[0]["present_visible.4"])
    agree(eager(case, source), theirs)
    graphs_agree(case, source, "everything", theirs)


def test_graphs_of_an_image_that_comes_first(checkpoints: Path) -> None:
    """Its first row sees no key at all; runtimes' own answer to that is no zero."""
    model, spec, source = loaded(checkpoints, "two-layers")
    decisions = Decisions(layers=(LayerRule(layers=(0,), visual_keys="none"),))
    case = case_of(2, spec, decisions)
    assert case.prompt.visual_positions[0] == 0
    graphs_agree(case, source, "image-first", expected(case, model))


def test_random_schedules_say_everything() -> None:
    """Every rule, and every value of every field, is among the cases."""
    found = [resolve(random_decisions(Random(number), SPEC), SPEC) for number in range(200)]
    rows = [row for schedule in found for row in schedule.rows]
    for field in ("query", "text_keys", "visual_keys", "ffn", "cache", "execute", "sublayers"):
        kind = get_type_hints(Row)[field]
        assert {getattr(row, field) for row in rows} == set(get_args(kind)), field
    rules = {type(row.select.by) for row in rows if row.select}
    assert rules == set(get_args(SelectionRule))
    assert {len(schedule.masks) for schedule in found} >= {0, 1, 2}
    assert {schedule.positions for schedule in found} == {"persistent", "compact"}
    assert {schedule.visual_tokens < 16 for schedule in found} == {True, False}


def test_graph_builder_and_bench_know_the_same_inputs() -> None:
    for number in range(100):
        schedule = resolve(random_decisions(Random(number), SPEC), SPEC)
        names = set(decoder_inputs(schedule))
        feeds = prefill_feeds(schedule, text=6, before_image=2)
        ranges = decoder_ranges(schedule, Limits(images=2))
        assert names == set(feeds) == set(ranges)
        for name, dims in decoder_inputs(schedule).items():
            low, high = ranges[name].min, ranges[name].max
            assert len(dims) == len(low), name
            for dim, least, most, size in zip(dims, low, high, feeds[name].shape, strict=True):
                assert least <= size <= most and (isinstance(dim, str) or dim == least == most), name
