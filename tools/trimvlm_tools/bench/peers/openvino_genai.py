"""OpenVINO GenAI: its language-model pipeline by token ids, its vision-language pipeline for answers.

Conversion is optimum-intel's, as GenAI documents it; `int4` is what its `--weight-format int4` makes
(language model in groups of 128, asymmetric; embeddings and LM head in int8). The decoder is converted once
with ids as input (`decoder`) and, where optimum-intel knows the whole model, again with embeddings (`model`).

GenAI 2026.4 prunes visual tokens (`pruning_ratio`, CDPruner) of Qwen-VL models only and says nothing where it
does not: https://openvinotoolkit.github.io/openvino.genai/docs/concepts/optimization-techniques/visual-token-pruning
"""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm_tools.bench.peers import Decoded
from trimvlm_tools.bench.peers._openvino_convert import (
    PROMPT,
    QUESTION,
    REFUSAL,
    convert_decoder,
    convert_model,
    load,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NAME = "openvino-genai"
REQUIREMENTS = (
    "openvino==2026.4.1",
    "openvino-genai==2026.4.1.0",
    "openvino-tokenizers==2026.4.1.0",
    "optimum-intel==2.2.0",
    "nncf==3.4.0",
    "transformers==5.5.4",
    "torch==2.13.0",
    "torchvision==0.28.0",
    "pillow>=10.4",
)
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "enable_prefix_caching": False,
}
PRECISIONS = ("fp32", "int4")
ANSWERS = True
PRUNES = True
_WHOLE_PROMPT = 2**31 - 1  # rows in one step, which is GenAI's own choice for a single request


def convert(checkpoint: Path, directory: Path, precision: str) -> None:
    """Writes the decoder and, where optimum-intel converts it, the whole model; else that it does not."""
    model = load(checkpoint)
    convert_decoder(model, checkpoint, directory / "decoder", precision)
    convert_model(model, checkpoint, directory / "model", precision)


def open_decoder(directory: Path, threads: int, precision: str) -> _Decoder:
    """The decoder in an `LLMPipeline`."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        str(directory / "decoder"), "CPU", **_properties(threads, precision)
    )
    return _Decoder(pipeline)


def open_answer(directory: Path, threads: int, precision: str, keep: int | None) -> _Answers:
    """The whole model in a `VLMPipeline`.

    Raises:
        UserError: optimum-intel does not convert this kind of model, or GenAI does not prune it.
    """
    model = directory / "model"
    if (model / REFUSAL).is_file():
        raise UserError((model / REFUSAL).read_text("utf-8"))
    if keep is not None:
        kind = json.loads((model / "config.json").read_text("utf-8"))["model_type"]
        raise UserError(
            f"{NAME}: keep {keep}: it prunes visual tokens of Qwen-VL models only, and of {kind!r} it would "
            "silently keep all; leave its pruning out"
        )
    import openvino_genai

    properties = _properties(threads, precision)
    pipeline = openvino_genai.VLMPipeline(str(model), "CPU", **properties)
    return _Answers(pipeline, (model / PROMPT).read_text("utf-8"))


def _properties(threads: int, precision: str) -> dict[str, Any]:
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = SETTINGS["enable_prefix_caching"]
    scheduler.max_num_batched_tokens = _WHOLE_PROMPT
    hints = {name: value for name, value in SETTINGS.items() if name.isupper()}
    if precision == "fp32":
        hints["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"  # or activations would be quantised
    return {**hints, "INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}


def _greedy(new_tokens: int) -> Any:
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return config


class _Decoder:
    """The pipeline's loop is its own; it gives no logits away."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def run(self, ids: NDArray[np.int64], new_tokens: int) -> Decoded:
        """Reads ids [S] and decodes; the time to the first token is the pipeline's own figure."""
        import numpy as np
        import openvino
        import openvino_genai

        ids_1S, config = ids[None], _greedy(new_tokens)
        prompt = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids_1S), openvino.Tensor(np.ones_like(ids_1S))
        )
        started = perf_counter()
        done = self._pipeline.generate(prompt, config)
        seconds = perf_counter() - started
        prefill = done.perf_metrics.get_ttft().mean / 1000
        return Decoded(
            prefill=prefill, decode=seconds - prefill, tokens=[int(t) for t in done.tokens[0]], logits=None
        )


class _Answers:
    def __init__(self, pipeline: Any, prompt: str) -> None:
        self._pipeline, self._prompt = pipeline, prompt

    def run(self, image: bytes, question: str) -> float:
        """Seconds to the first token."""
        import io

        import numpy as np
        import openvino
        from PIL import Image

        started = perf_counter()
        picture = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        prompt = self._prompt.replace(QUESTION, question)
        self._pipeline.generate(prompt, images=[openvino.Tensor(picture)], generation_config=_greedy(1))
        return perf_counter() - started
