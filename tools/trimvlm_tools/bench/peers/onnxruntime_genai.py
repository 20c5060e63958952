"""onnxruntime-genai: a decoder graph from its own model builder, run by its Generator on ONNX Runtime's CPU.

`prune_lm_head` is the builder's documented option for logits of the last row alone. The builder takes every
matrix with as many rows as the vocabulary for the LM head, so a model whose FFN is as wide as its vocabulary
comes out wrong.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._plain_decoder import read_decoder, write_decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "onnxruntime-genai"
REQUIREMENTS = (
    "onnxruntime-genai==0.18.0",
    "onnxruntime==1.31.1",
    "onnx==1.23.2",  # this and what follows: for its model builder
    "onnx-ir==1.1.0",
    "torch==2.13.0",
    "transformers==5.23.0",
)
BUILDER_OPTIONS = {"prune_lm_head": "true"}
# In int4: its largest blocks that ONNX Runtime has kernels of their own for; the builder's default is 32.
INT4_OPTIONS = {"block_size": "128"}
# As for ONNX Runtime everywhere here: threads wait busily within a run, not after it.
SESSION_OPTIONS = {"session.force_spinning_stop": "1"}
SETTINGS: dict[str, Any] = {"builder": BUILDER_OPTIONS, "int4": INT4_OPTIONS, "session": SESSION_OPTIONS}
PRECISIONS = ("fp32", "int4")
ANSWERS = PRUNES = False


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Takes the decoder out of the checkpoint and has the model builder make its graph."""
    decoder, plain = read_decoder(checkpoint), directory / "plain"
    write_decoder(decoder, checkpoint, plain)
    chosen = BUILDER_OPTIONS | (INT4_OPTIONS if precision == "int4" else {})
    options = ["hf_token=false", *(f"{key}={value}" for key, value in chosen.items())]
    paths = ["-i", str(plain), "-o", str(directory), "-c", str(directory / "cache")]
    sys.argv = ["builder", *paths, "-e", "cpu", "-p", precision, "--extra_options", *options]
    # Its command line in this process: an error keeps its own words.
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    for made in (plain, directory / "cache"):
        shutil.rmtree(made, ignore_errors=True)


def open_decoder(directory: Path, threads: int, precision: str) -> Runner:
    """Loads the graph."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    session = SESSION_OPTIONS | {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return Runner(onnxruntime_genai.Model(config))


class Runner:
    """Holds one Generator with its KV buffers; every run rewinds it to nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.generator: Any = None
        self.rows = 0

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """See `DecoderRunner`."""
        import numpy as np

        self._rewind(len(ids) + new_tokens)
        prompt = ids.astype(np.int32)
        started = time.perf_counter()
        self.generator.append_tokens(prompt)
        read = time.perf_counter()
        logits = self.generator.get_logits().reshape(-1).astype(np.float32)  # a copy that no caller waits for
        resumed = time.perf_counter()
        tokens = [self._next()]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            if self.generator.is_done():  # an end token: it becomes a word like any other
                self.generator.append_tokens(np.array(tokens[-1:], np.int32))
            tokens.append(self._next())
        last = time.perf_counter()
        prefill = (read - started) + (first - resumed)
        return Decoded(prefill=prefill, decode=last - first, tokens=tokens, logits=logits)

    def _next(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def _rewind(self, rows: int) -> None:
        import onnxruntime_genai

        if self.rows == rows:
            self.generator.rewind_to(0)
            return
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=rows, do_sample=False, batch_size=1)
        self.generator, self.rows = onnxruntime_genai.Generator(self.model, params), rows
