"""llama.cpp through llama-cpp-python, compiled on this machine for its processor.

The C interface is called directly: prefill and decode are timed apart, without a sampler. The prompt is one
call, which llama.cpp cuts into its default of 512 rows at a time: faster than all rows at once, whose
attention spans also what is still to come. Its flash attention on a CPU computes with keys and values in
float16, its default for the KV cache: that is how int4 runs. In fp32 both are off, to compute what
others do; `llama.cpp-f16` is fp32 with both on.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._gguf import write_gguf
from trimvlm_tools.bench.peers._plain_decoder import read_decoder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "llama.cpp"
REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
# Multi-modal tools are not built: they take as long as the rest.
BUILD_ENVIRONMENT = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"}
SETTINGS: dict[str, Any] = {
    "build": BUILD_ENVIRONMENT["CMAKE_ARGS"],
    "n_batch": "prompt length",
    "n_ubatch": "512 (default)",
    "fp32": "KV cache F32, flash attention off (it computes in F16)",
    "int4": "Q4_0 in all matrices (pure), repacked when loaded; KV cache F16, flash attention on (defaults)",
}
PRECISIONS = ("fp32", "int4")
ANSWERS = PRUNES = False
_MODEL = "model.gguf"


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Writes a GGUF of the decoder in fp32; for int4, llama.cpp's own quantiser makes Q4_0 of it."""
    import llama_cpp

    whole = directory / "fp32.gguf"
    write_gguf(read_decoder(checkpoint), whole)
    if precision == "fp32":
        whole.rename(directory / _MODEL)
        return
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.pure = True
    model = str(directory / _MODEL).encode()
    if llama_cpp.llama_model_quantize(str(whole).encode(), model, ctypes.byref(params)):
        raise RuntimeError("llama.cpp's quantiser failed")
    whole.unlink()


def open_decoder(directory: Path, threads: int, precision: str) -> Runner:
    """Loads the model."""
    return Runner(load(directory), threads, whole=precision == "fp32")


def load(directory: Path) -> Any:
    """llama.cpp's handle of a converted model.

    Raises:
        RuntimeError: it cannot be loaded.
    """
    import llama_cpp

    llama_cpp.llama_backend_init()
    path = str(directory / _MODEL).encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    if model is None:
        raise RuntimeError("llama.cpp could not load the model")
    return model


class Runner:
    """Holds one context; it is made when the length of the prompt is known, and again for another.

    Args:
        whole: attention in float32.
    """

    def __init__(self, model: Any, threads: int, *, whole: bool) -> None:
        self.model, self.threads, self.whole = model, threads, whole
        self.context: Any = None
        self.made_for: tuple[int, int] | None = None

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """See `DecoderRunner`."""
        import llama_cpp

        self._make_context(len(ids), new_tokens)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        prompt = (llama_cpp.llama_token * len(ids))(*ids.tolist())
        started = time.perf_counter()
        logits = self._decode(prompt, len(ids))
        tokens = [int(logits.argmax())]
        first = time.perf_counter()
        kept = logits.copy()
        step = (llama_cpp.llama_token * 1)()
        resumed = time.perf_counter()
        for _ in range(new_tokens - 1):
            step[0] = tokens[-1]
            tokens.append(int(self._decode(step, 1).argmax()))
        last = time.perf_counter()
        return Decoded(prefill=first - started, decode=last - resumed, tokens=tokens, logits=kept)

    def _decode(self, tokens: Any, count: int) -> NDArray[np.float32]:
        """Logits [V] of the last row, in llama.cpp's own memory."""
        import llama_cpp
        import numpy as np

        if code := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise RuntimeError(f"llama_decode returned {code}")
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (vocab,))

    def _make_context(self, prompt: int, new_tokens: int) -> None:
        import llama_cpp

        if self.made_for == (prompt, new_tokens):
            return
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = prompt + new_tokens
        params.n_batch = prompt
        params.n_outputs_max = 1
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.whole:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if self.context is None:
            raise RuntimeError(f"llama.cpp could not make a context of {prompt + new_tokens} rows")
        self.made_for = (prompt, new_tokens)
