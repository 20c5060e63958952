"""A decoder graph against what was made of it: prefill and decode on ONNX Runtime, every output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimvlm.backends import Backend
from trimvlm.backends.blocks import Blocks, block_roles
from trimvlm.backends.run_onnxruntime import open_backend
from trimvlm.decoding import Decoder, prefill_inputs, step_inputs
from trimvlm.mrope import Coordinates
from trimvlm.rules import RouterScores
from trimvlm.schedule import Schedule
from trimvlm.text import Prompt
from trimvlm_engines.splitting import Piece

BEFORE, TEXT, STEPS = 3, 9, 3  # text rows before the images, text rows in all, decode steps


def opened(graph: Path, pieces: Sequence[Piece]) -> Backend:
    """The pieces, written beside the bundle's graph under hidden names, as one decoder."""
    files = {}
    for piece in pieces:
        assert piece.graph is not None
        files[piece.role] = graph.with_name(f".{graph.stem}.{piece.role}.onnx")
        files[piece.role].write_bytes(piece.graph)
    backend = open_backend(files, threads=1)
    roles = block_roles(files)
    return Blocks(backend, roles) if roles else backend


def assert_same_answers(graph: Path, pieces: Sequence[Piece], schedule: Schedule, *, images: int = 1) -> None:
    """Every output of a prefill and some decode steps, bit for bit, whether fetched or kept."""
    _assert_same(open_backend({"decoder": graph}, threads=1), opened(graph, pieces), schedule, images, 0)


def assert_close_answers(graph: Path, other: Path, schedule: Schedule, *, images: int = 1) -> None:
    """The same of two graphs that compute in another order, within float32 of the largest value."""
    one, two = (open_backend({"decoder": each}, threads=1) for each in (graph, other))
    _assert_same(one, two, schedule, images, 2e-5)


def _assert_same(whole: Backend, other: Backend, schedule: Schedule, images: int, atol: float) -> None:
    with whole, other:
        assert other.inputs("decoder") == whole.inputs("decoder")
        assert other.outputs("decoder") == whole.outputs("decoder")
        expected, tokens = _answer(whole, schedule, images)
        found, same = _answer(other, schedule, images)
        assert tokens == same
        for number, (want, have) in enumerate(zip(expected, found, strict=True)):
            assert want.keys() == have.keys()
            for name, array in want.items():
                limit = atol * np.abs(array).max(initial=1)
                np.testing.assert_allclose(
                    have[name], array, rtol=0, atol=limit, err_msg=f"{name} of run {number}"
                )


def _answer(backend: Backend, schedule: Schedule, images: int) -> tuple[list[dict[str, Any]], list[int]]:
    """All outputs of every run, and the tokens of the same runs with caches that are kept."""
    prompt, rest = _prompt(schedule, images)
    names = list(backend.outputs("decoder"))
    fetched, kept = (
        Decoder(backend, names),
        Decoder(backend, ["logits"], [n for n in names if "present" in n]),
    )
    runs, tokens = [fetched(rest)], []
    outputs = kept(rest)
    for step in range(STEPS):
        token = int(outputs["logits"].argmax())
        tokens.append(token)
        lag = 0 if schedule.model.mrope else None
        position = prompt.length + step
        runs.append(fetched(step_inputs(token, position, runs[-1], lag=lag)))
        outputs = kept(step_inputs(token, position, outputs, lag=lag))
    return runs, tokens


def _prompt(schedule: Schedule, images: int) -> tuple[Prompt, dict[str, Any]]:
    random, rows = np.random.default_rng(0), images * schedule.visual_tokens
    places = np.arange(TEXT + rows)
    visual = (places >= BEFORE) & (places < BEFORE + rows)
    prompt = Prompt(
        input_ids=random.integers(7, 60, TEXT),
        text_positions=places[~visual],
        visual_positions=places[visual],
    )
    scores = random.random(rows, np.float32) if _routed(schedule) else None
    turns = None
    if schedule.model.mrope:
        text, rows_of = (np.stack([places[rows]] * 3) for rows in (~visual, visual))
        turns = Coordinates(text=text, visual=rows_of, lag=0)
    return prompt, prefill_inputs(
        prompt,
        random.normal(size=(rows, schedule.model.hidden)).astype(np.float32),
        places=turns,
        router_scores=scores,
    )


def _routed(schedule: Schedule) -> bool:
    return any(row.select and isinstance(row.select.by, RouterScores) for row in schedule.rows)
