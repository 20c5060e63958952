"""What the tests of families with tiles share: pixels and features by transformers, and by the graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from trimvlm.encoder import make_encoder
from trimvlm.encoder_rules import EncoderStage, VisionTaps, taps
from trimvlm.profile import Decisions, Grid, Method, Profile
from trimvlm.schedule import Schedule
from trimvlm_export.decoder_graph import decoder_names, make_decoder
from trimvlm_export.reference_encoder import reduced_features
from trimvlm_export.source import Source
from trimvlm_export.vision_graph import export_projector, export_tower

# Two implementations in float32, on values of up to a few tens.
TOLERANCE = 1e-4


class Family:
    """One tiny checkpoint, in transformers and placed in a bundle."""

    def __init__(self, checkpoint: Path, dtype: Any = "float32") -> None:
        self.checkpoint, self.out = checkpoint, checkpoint.parent / f"{checkpoint.name}-{dtype}"
        self.out.mkdir(exist_ok=True)
        self.source = Source.place(checkpoint, self.out, dtype)
        self.family, self.config = self.source.family, self.source.config

    @cached_property
    def model(self) -> Any:
        """transformers' own, in float32."""
        return AutoModelForImageTextToText.from_pretrained(self.checkpoint, dtype=torch.float32).eval()

    def inputs(self, *sizes: Grid) -> dict[str, torch.Tensor]:
        """What the family's image processor gives for images of (height, width)."""
        processor = AutoImageProcessor.from_pretrained(self.checkpoint)
        pictures = [picture(size, seed) for seed, size in enumerate(sizes)]
        return dict(processor(images=pictures, return_tensors="pt"))

    def features(self, inputs: Mapping[str, Any], **options: Any) -> torch.Tensor:
        """What transformers feeds to the decoder [rows, D]."""
        given = {name: values for name, values in inputs.items() if name in ("pixel_values", "image_sizes")}
        with torch.no_grad():
            output = self.model.model.get_image_features(**given, **options).pooler_output
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in output])

    def module(self, grid: Grid | None, wanted: VisionTaps | None = None) -> Any:
        """The exported module with the checkpoint's weights."""
        module = self.family.Vision(self.config, grid, wanted).requires_grad_(False).eval()
        self.source.load(module, module.parameter_names())
        return module

    def graph(self, grid: Grid | None, wanted: VisionTaps | None = None) -> Path:
        """The exported vision graph's file."""
        return self.out / export_tower(self.source, grid, wanted)

    def check_stage(self, grid: Grid, inputs: Mapping[str, Any], stage: EncoderStage) -> list[list[int]]:
        """Tower graph, numpy selection and projector graph against the reference, for images of one grid.

        Returns:
            The chosen tokens of each image, as numbers of its views' tokens.
        """
        tower, pixels = self.family.tower(self.config, grid), inputs["pixel_values"]
        images = pixels[:, : tower.views] if pixels.ndim == 5 else pixels.split(tower.views)
        per_view = msgspec.structs.replace(stage, keep=stage.keep // tower.views)
        encode, rows, chosen = make_encoder(per_view, tower.patches), [], []
        graph = self.graph(grid, taps(stage.by))
        for image in images:
            found, tokens = run(graph, pixel_values=image), []
            for view in range(tower.views):
                kept, patches = encode({name: value[view] for name, value in found.items()})
                rows.append(kept)
                tokens += (view * tower.patches + patches).tolist()
            chosen.append(tokens)
        projector = self.out / export_projector(self.source, grid)
        visual = run(projector, features=np.concatenate(rows))["visual"]
        expected, wanted = reduced_features(self.model, inputs, stage)
        assert chosen == [tokens.tolist() for tokens in wanted]
        assert visual.shape == (len(images) * stage.keep, self.config.text_config.hidden_size)
        np.testing.assert_allclose(visual, expected, atol=TOLERANCE)
        return chosen

    def ignored(self, grid: Grid | None) -> dict[str, str]:
        """Tensors that neither vision nor decoder takes; an error for one without a reason."""
        self.module(grid)
        self.decoder(grid)
        return self.source.ignored()

    def decoder(self, grid: Grid | None) -> Any:
        """The dense decoder with the checkpoint's weights."""
        model = self.family.model_spec(self.config, None, grid)
        profile = Profile(name="dense", method=Method(name="dense"), model=model, decisions=Decisions())
        decoder = make_decoder(self.config, Schedule.resolve(profile, model))
        self.source.load(decoder, decoder_names(self.family, self.config, decoder))
        return decoder


def picture(size: Grid, seed: int = 0) -> Image.Image:
    """Coarse random blocks, (height, width)."""
    blocks = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def run(graph: Path, **inputs: Any) -> dict[str, np.ndarray]:
    """Outputs of a graph by name."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: np.asarray(value) for name, value in inputs.items()})
    return {name: np.asarray(value) for name, value in zip(names, found, strict=True)}


def external(graph: Path) -> list[str]:
    """Names of the initialisers whose bytes lie in the checkpoint's files."""
    model = onnx.load(graph, load_external_data=False)
    return [
        tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]


def rewrite(checkpoint: Path, out: Path, change: Any) -> Path:
    """A copy of a checkpoint, with `change(name, tensor)` -> (name, tensor), or None: left out."""
    out.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            tensors = dict(filter(None, (change(*item) for item in load_file(file).items())))
            save_file(tensors, out / file.name, {"format": "pt"})
        else:
            (out / file.name).write_bytes(file.read_bytes())
    return out


def shards(checkpoint: Path) -> int:
    """How many weight files a checkpoint's index names."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return len(set(index["weight_map"].values()))
