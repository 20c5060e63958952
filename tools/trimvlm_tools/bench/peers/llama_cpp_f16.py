"""llama.cpp with its own defaults for attention, flash attention and a KV cache in float16; weights in fp32.

That is not the same arithmetic as fp32 elsewhere: its logits differ from ours by about a thousandth of the
largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimvlm_tools.bench.peers import llama_cpp

NAME = "llama.cpp-f16"
ENVIRONMENT = MODELS = llama_cpp.NAME
REQUIREMENTS = llama_cpp.REQUIREMENTS
BUILD_ENVIRONMENT = llama_cpp.BUILD_ENVIRONMENT
SETTINGS: dict[str, Any] = {
    "build": llama_cpp.SETTINGS["build"],
    "n_batch": llama_cpp.SETTINGS["n_batch"],
    "n_ubatch": llama_cpp.SETTINGS["n_ubatch"],
    "fp32": "weights F32; KV cache F16, flash attention on (defaults)",
}
PRECISIONS = ("fp32",)
ANSWERS = PRUNES = False
convert = llama_cpp.convert


def open_decoder(directory: Path, threads: int, precision: str) -> llama_cpp.Runner:
    """Loads the model."""
    return llama_cpp.Runner(llama_cpp.load(directory), threads, whole=False)
