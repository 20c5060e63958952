"""The transformers peers on a tiny model: what they compute, that no run leaves anything to the next."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_tiled import tiny_onevision

from trimvlm.errors import UserError
from trimvlm_tools.bench.geometry import Geometry, make_checkpoint
from trimvlm_tools.bench.peers import (
    _greedy,
    _torch_model,
    transformers_compiled,
    transformers_eager,
    transformers_onnx,
)
from trimvlm_tools.bench.random_llava import IMAGE

GEOMETRY = Geometry(
    name="peers", layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=64, vocab=64, image=28,
    vision_layers=2, vision_hidden=32, text=10,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(7, GEOMETRY.vocab, 12)
NEW_TOKENS = 4
QUESTION = GEOMETRY.question(GEOMETRY.text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(GEOMETRY, tmp_path_factory.mktemp("peers") / "checkpoint")


@pytest.fixture(scope="module")
def expected(checkpoint) -> tuple[list[int], np.ndarray]:
    """Greedy tokens and the prompt's logits, each token from a whole forward pass without a cache."""
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    ids, first = IDS.tolist(), None
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].numpy()
            first = logits if first is None else first
            ids.append(int(logits.argmax()))
    assert first is not None
    return ids[len(IDS) :], first


def opened(peer: Any, checkpoint: Path, directory: Path) -> Any:
    directory.mkdir()
    peer.convert(checkpoint, directory, "fp32")
    return peer.open_decoder(directory, 1, "fp32")


def check_decoder(runner: Any, expected: tuple[list[int], np.ndarray]) -> None:
    """Right, right again after other ids (no cache is left), and right for another length."""
    tokens, logits = expected
    first = runner.run(IDS, NEW_TOKENS)
    runner.run(IDS[::-1].copy(), NEW_TOKENS)
    again = runner.run(IDS, NEW_TOKENS)
    for done in (first, again):
        assert done.tokens == tokens
        assert done.logits is not None
        np.testing.assert_allclose(done.logits, logits, atol=1e-5)
        assert done.prefill > 0 and done.decode > 0
    assert runner.run(np.append(IDS, tokens[0]), NEW_TOKENS - 1).tokens == tokens[1:]


def test_eager_decodes_as_the_model_itself(checkpoint, expected, tmp_path):
    check_decoder(opened(transformers_eager, checkpoint, tmp_path / "eager"), expected)


def test_compiled_decodes_as_the_model_itself_and_compiles_before_the_clock(
    checkpoint, expected, tmp_path, monkeypatch
):
    compiled: list[int] = []
    at_clock: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        """Everything but Inductor, which takes minutes: one graph per shape over a static cache."""
        compiled.append(1)
        return graph.forward

    def clocked(*args: Any) -> Any:
        at_clock.append(len(compiled))
        return _greedy.decode_greedily(*args)

    monkeypatch.setitem(transformers_compiled.COMPILE, "backend", backend)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "open_decoder sets it, the end of the test restores it")
    monkeypatch.setattr(transformers_compiled, "decode_greedily", clocked)
    runner = opened(transformers_compiled, checkpoint, tmp_path / "compiled")
    for ids in (IDS, IDS[::-1].copy()):
        runner.run(ids, NEW_TOKENS)
        assert at_clock[-1] == len(compiled) >= 2
    check_decoder(runner, expected)


def exporter_is_there() -> bool:
    try:
        transformers_onnx.check_exporter()
    except UserError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not exporter_is_there(), reason="this transformers has no ONNX Runtime fusions")
def test_the_exporters_graphs_decode_as_the_model_itself(checkpoint, expected, tmp_path):
    check_decoder(opened(transformers_onnx, checkpoint, tmp_path / "onnx"), expected)


def test_an_exporter_without_fusions_is_refused_before_anything_is_made(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_onnx, "SETTINGS", {"no_such_setting": True})
    with pytest.raises(UserError, match="exports without ONNX Runtime's fusions"):
        transformers_onnx.convert(checkpoint, tmp_path, "fp32")
    assert not list(tmp_path.iterdir())


def test_answers_start_from_the_image_and_the_question(checkpoint, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (40, 50)).save(picture, "png")
    transformers_eager.convert(checkpoint, tmp_path, "fp32")
    processor = _torch_model.load_processor(tmp_path)
    ids = _torch_model.read_question(processor, picture.getvalue(), QUESTION)["input_ids"][0]
    assert int((ids == IMAGE).sum()) == GEOMETRY.visual_tokens
    assert int((ids != IMAGE).sum()) == GEOMETRY.text
    answers = transformers_eager.open_answer(tmp_path, 1, "fp32", None)
    assert answers.run(picture.getvalue(), QUESTION) > 0
    with pytest.raises(OSError):
        answers.run(b"no image", QUESTION)


def test_answers_of_a_family_whose_processor_also_takes_videos(tmp_path):
    """transformers makes no such processor where torchvision is not installed."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 50)).save(picture, "png")
    (tmp_path / "peer").mkdir()
    transformers_eager.convert(tiny_onevision(tmp_path / "checkpoint"), tmp_path / "peer", "fp32")
    answers = transformers_eager.open_answer(tmp_path / "peer", 1, "fp32", None)
    assert answers.run(picture.getvalue(), "what") > 0


@pytest.mark.parametrize("new_tokens", [1, 3])
def test_the_greedy_loop_reads_each_token_at_its_place(new_tokens):
    logits_NV = np.eye(5, dtype=np.float32)
    read: list[tuple[int, int]] = []

    def step(token: int, position: int) -> np.ndarray:
        read.append((token, position))
        return logits_NV[token + 1]

    done = _greedy.decode_greedily(lambda: logits_NV[2], step, 7, new_tokens)
    assert done.tokens == [2, 3, 4][:new_tokens]
    assert read == [(2, 7), (3, 8)][: new_tokens - 1]
    assert np.array_equal(done.logits, logits_NV[2])
