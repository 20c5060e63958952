"""transformers in PyTorch, compiled by Inductor, with a static cache: prefill and decode each a graph.

The shapes of a run decide both graphs, so the first run of a shape compiles, before its clock starts.
Inductor keeps what it compiled beside the converted model, for the next process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._greedy import decode_greedily
from trimvlm_tools.bench.peers._torch_model import link_checkpoint, load_decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "transformers-compiled"
REQUIREMENTS = ()
# Inductor's `freezing` is left out: each graph then holds its own laid-out copy of the weights, for no gain.
COMPILE = {"backend": "inductor", "fullgraph": True, "dynamic": False}
SETTINGS = {
    "attention": "sdpa",
    "cache": "static",
    **COMPILE,
    "open": "without compiling, which takes place in the first run and is not timed",
}
PRECISIONS = ("fp32",)
ANSWERS = False
PRUNES = False


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Links the checkpoint: transformers loads it as it is."""
    link_checkpoint(checkpoint, directory)


def open_decoder(directory: Path, threads: int, precision: str) -> _Decoder:
    """The decoder of a checkpoint; it is compiled in its first run."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory / "inductor")  # before torch is loaded
    return _Decoder(*load_decoder(directory, threads))


class _Decoder:
    def __init__(self, decoder: Any, lm_head: Any) -> None:
        self._decoder, self._lm_head = decoder, lm_head
        self._cache: Any = None
        self._compiled: dict[int, Any] = {}  # by rows read at once
        self._shape = (0, 0)

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """Reads ids [S] into an empty cache and decodes; compiles before the clock where a shape is new."""
        import torch

        with torch.no_grad():
            if self._shape != (len(ids), new_tokens):
                self._compile(len(ids), new_tokens)
            return self._decode(ids, new_tokens)

    def _decode(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        import torch

        self._cache.reset()
        rows = len(ids)
        ids_S, places_S = torch.from_numpy(ids), torch.arange(rows)

        def read(tokens_S: Any, positions_S: Any) -> NDArray[np.float32]:
            return self._compiled[len(tokens_S)](tokens_S[None], positions_S[None]).numpy()

        return decode_greedily(
            lambda: read(ids_S, places_S),
            lambda token, position: read(torch.tensor([token]), torch.tensor([position])),
            rows,
            new_tokens,
        )

    def _compile(self, rows: int, new_tokens: int) -> None:
        import numpy as np
        import torch
        from transformers import StaticCache

        torch.compiler.reset()
        self._cache = StaticCache(config=self._decoder.config, max_cache_len=rows + new_tokens)
        # Two functions: a graph each, neither guarded by the other's shape.
        self._compiled = {count: torch.compile(self._step(), **COMPILE) for count in {rows, 1}}
        self._shape = rows, new_tokens
        for _ in range(2):  # the cache is laid out by the first pass, and its graphs hold from the second on
            self._decode(np.zeros(rows, np.int64), min(new_tokens, 2))

    def _step(self) -> Any:
        decoder, lm_head, cache = self._decoder, self._lm_head, self._cache

        def step(input_ids: Any, position_ids: Any) -> Any:
            done = decoder(
                input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True
            )
            return lm_head(done.last_hidden_state[0, -1])

        return step
