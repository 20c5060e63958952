"""transformers in PyTorch as it is loaded: eager, fp32, scaled-dot-product attention."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._greedy import decode_greedily
from trimvlm_tools.bench.peers._torch_model import (
    link_checkpoint,
    load_decoder,
    load_model,
    load_processor,
    read_question,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "transformers-eager"
REQUIREMENTS = ()
SETTINGS = {"attention": "sdpa", "cache": "dynamic", "inference_mode": True}
PRECISIONS = ("fp32",)
ANSWERS = True
PRUNES = False


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Links the checkpoint: transformers loads it as it is."""
    link_checkpoint(checkpoint, directory)


def open_decoder(directory: Path, threads: int, precision: str) -> _Decoder:
    """The decoder of a checkpoint."""
    return _Decoder(*load_decoder(directory, threads))


def open_answer(directory: Path, threads: int, precision: str, keep: int | None) -> _Answers:
    """The whole model; it keeps all visual tokens."""
    assert keep is None
    return _Answers(load_model(directory, threads), load_processor(directory))


class _Decoder:
    """Runs the language model without `generate`, whose bookkeeping would only add to its time."""

    def __init__(self, decoder: Any, lm_head: Any) -> None:
        self._decoder, self._lm_head = decoder, lm_head

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """Reads ids [S] into an empty cache and decodes."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._decoder.config)

        def read(tokens_S: Any) -> NDArray[np.float32]:
            done = self._decoder(input_ids=tokens_S[None], past_key_values=cache, use_cache=True)
            return self._lm_head(done.last_hidden_state[0, -1]).numpy()

        ids_S = torch.from_numpy(ids)
        with torch.inference_mode():
            return decode_greedily(
                lambda: read(ids_S), lambda token, _: read(torch.tensor([token])), len(ids), new_tokens
            )


class _Answers:
    """The processor and `generate`, as the model's documentation has it."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    def run(self, image: bytes, question: str) -> float:
        """Seconds to the first token."""
        import torch

        started = perf_counter()
        inputs = read_question(self._processor, image, question)
        with torch.inference_mode():
            self._model.generate(**inputs, max_new_tokens=1, do_sample=False)
        return perf_counter() - started
