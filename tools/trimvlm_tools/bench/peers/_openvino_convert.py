"""From a Hugging Face checkpoint to OpenVINO's format with optimum-intel and, for int4, NNCF."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

REFUSAL = "refusal.txt"  # beside a model that optimum-intel does not convert: why
PROMPT = "prompt.txt"  # the chat template with QUESTION in it
QUESTION = "{question}"
# A tower saved by a newer transformers has lost a level of its names.
_OLD_NAMES = {r"vision_tower\.(?!vision_model\.)": "vision_tower.vision_model."}


def load(checkpoint: Path) -> Any:
    """The whole model in PyTorch, fp32."""
    import torch

    _hide_broken_torchvision()
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, key_mapping=_OLD_NAMES
    )
    return model.eval()


def _hide_broken_torchvision() -> None:
    """A torchvision built for CUDA, the index's, does not load beside a torch without; LLaVA needs none."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def convert_decoder(model: Any, checkpoint: Path, directory: Path, precision: str) -> None:
    """The language model alone: ids in, logits out, KV cache inside; and the tokenizer that GenAI wants."""
    import torch
    from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.device("meta"):  # without weights: the model's own take their place
        decoder: Any = AutoModelForCausalLM.from_config(model.config.get_text_config(), dtype=torch.float32)
    decoder.model, decoder.lm_head = model.get_decoder(), model.get_output_embeddings()
    export_from_model(decoder.eval(), directory, task="text-generation-with-past")
    export_tokenizer(AutoTokenizer.from_pretrained(checkpoint), directory)
    if precision == "int4":
        compress(directory / "openvino_model.xml", four_bits=True)


def convert_model(model: Any, checkpoint: Path, directory: Path, precision: str) -> None:
    """The whole model as GenAI's `VLMPipeline` loads it; optimum-intel's refusal is written down."""
    from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoProcessor

    kind = model.config.model_type
    directory.mkdir(parents=True, exist_ok=True)
    try:
        TasksManager.get_supported_tasks_for_model_type(kind, "openvino", library_name="transformers")
    except KeyError:
        words = f"optimum-intel {version('optimum-intel')} converts no whole model of type {kind!r}"
        (directory / REFUSAL).write_text(words, "utf-8")
        return
    processor = AutoProcessor.from_pretrained(checkpoint)
    export_from_model(model, directory, task="image-text-to-text", preprocessors=[processor])
    export_tokenizer(processor.tokenizer, directory)
    # GenAI reads sizes and means from the file that transformers before 5 wrote.
    processor.image_processor.save_pretrained(directory)
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    (directory / PROMPT).write_text(prompt, "utf-8")
    if precision == "int4":
        for graph in sorted(directory.glob("openvino_*_model.xml")):
            compress(graph, four_bits=graph.name == "openvino_language_model.xml")


def compress(graph: Path, *, four_bits: bool) -> None:
    """Compresses a graph's weights in place: int4 in groups of 128, or int8 by channel, both asymmetric."""
    import nncf
    import openvino

    options = {}
    if four_bits:
        mode = nncf.CompressWeightsMode.INT4_ASYM
        # A width that 128 does not divide gets smaller groups.
        fallback = nncf.GroupSizeFallbackMode.ADJUST
        options = {"group_size": 128, "ratio": 1.0, "advanced_parameters": _advanced(fallback)}
    else:
        mode = nncf.CompressWeightsMode.INT8_ASYM
    model = nncf.compress_weights(openvino.Core().read_model(graph), mode=mode, **options)
    aside = graph.with_name(f"small_{graph.name}")
    openvino.save_model(model, aside, compress_to_fp16=False)
    del model  # it reads the old weights, which are mapped
    for suffix in (".xml", ".bin"):
        aside.with_suffix(suffix).replace(graph.with_suffix(suffix))


def _advanced(fallback: Any) -> Any:
    import nncf

    return nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback)
