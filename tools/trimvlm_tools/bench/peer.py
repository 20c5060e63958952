"""The peer: transformers' own ONNX exporter with its ONNX Runtime fusions, as its documentation recommends.

`OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True, ort_fusions="cpu"))` splits a
LLaVA into components and exports each. Prefill of the decoder is the component `language_model`: embeddings
in, last hidden states and cache out. Only that one is exported here (the documented way to do so is
`decompose_for_generation`). It has no LM head and no embedding look-up, which leaves a little work out, in
the peer's favour. Its attention masks nothing but the future, as ours.
"""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from trimvlm.errors import UserError
from trimvlm_tools.bench.geometry import GEOMETRY_FILE, Geometry
from trimvlm_tools.bench.machine import fingerprint
from trimvlm_tools.bench.quiet import quiet

GRAPH = "language_model.onnx"
SETTINGS = {"dynamic": True, "ort_fusions": "cpu"}


def export_peer(checkpoint: Path, geometry: Geometry, directory: Path) -> Path:
    """Writes the peer's prefill graph of a checkpoint to `directory`, or finds it there.

    Returns:
        The graph file; its weights lie beside it.
    """
    stamp = directory / "made.json"
    versions = fingerprint().versions
    made = json.dumps(
        {
            "checkpoint": (checkpoint / GEOMETRY_FILE).read_text(),
            "settings": SETTINGS,
            "versions": {name: versions[name] for name in ("onnx", "torch", "transformers")},
        }
    )
    if not (stamp.is_file() and stamp.read_text() == made):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        _export(checkpoint, geometry, directory)
        stamp.write_text(made)  # last: without it the directory counts as not made
    return directory / GRAPH


def check_peer() -> None:
    """Refuses a transformers whose exporter lacks the settings that the peer is measured with.

    Raises:
        UserError: naming the version.
    """
    import transformers
    from transformers.exporters.configs import OnnxConfig

    if not set(SETTINGS) <= set(inspect.signature(OnnxConfig).parameters):
        raise UserError(
            f"--against transformers: transformers {transformers.__version__} exports without ONNX Runtime's "
            "fusions; install 5.23 or newer (it needs Python 3.11), or leave --against out"
        )


def _export(checkpoint: Path, geometry: Geometry, directory: Path) -> None:
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    turn = [{"type": "image"}, {"type": "text", "text": geometry.question(geometry.text)}]
    image = Image.new("RGB", (geometry.image, geometry.image))
    with quiet():
        model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(checkpoint)
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True
        )
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        decoder: Any
        decoder, sample = decompose_for_generation(model, dict(inputs))["language_model"]
        exported = OnnxExporter().export(decoder, sample, OnnxConfig(**SETTINGS))
        OnnxExporter.save_program(exported.program, directory / GRAPH)


def read_tensor(checkpoint: Path, name_ends: str) -> np.ndarray:
    """The one weight of a single-file checkpoint whose name ends so.

    Raises:
        KeyError: none or several.
    """
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", framework="numpy") as file:
        names = [name for name in file.keys() if name.endswith(name_ends)]  # noqa: SIM118 - not a dict
        if len(names) != 1:
            raise KeyError(f"{name_ends}: {names}")
        return file.get_tensor(names[0])


def logits(last_hidden_D: np.ndarray, lm_head_VD: np.ndarray) -> np.ndarray:
    """float32 [V]: what the peer's graph leaves out, to compare its result with ours."""
    return lm_head_VD @ last_hidden_D
