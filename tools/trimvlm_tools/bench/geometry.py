"""Models to measure: checkpoints of a geometry with random weights; time and memory need no training."""

from __future__ import annotations

import math
import shutil
from functools import cache
from pathlib import Path
from typing import TypeAlias

import msgspec

from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm.value import Value
from trimvlm_tools.bench.quiet import quiet
from trimvlm_tools.bench.random_llava import (
    BOS,
    EOS,
    PAD,
    SPECIAL,
    TEXT_BEFORE_IMAGE,
    make_config,
    make_processor,
    word,
)
from trimvlm_tools.random_checkpoint import make as described
from trimvlm_tools.random_checkpoint.description import load
from trimvlm_tools.random_checkpoint.weights import tensors, write

GEOMETRY_FILE = "geometry.json"  # in a checkpoint's directory: what it was made as


class Geometry(Value, frozen=True, kw_only=True):
    """A LLaVA of given sizes.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: the Llama decoder.
        image, patch: side of the image and of a patch in pixels; (image / patch)^2 visual tokens.
        vision_layers, vision_hidden, vision_head_dim: the CLIP tower, small where the decoder is measured.
        text: text rows of the prompt that is measured, all of them together.
        picture: width and height in pixels of the picture that is asked about.
        seed: what the weights are drawn with.
    """

    name: str
    layers: int = 8
    hidden: int = 1024
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64
    ffn: int = 2816
    vocab: int = 8192
    image: int = 336
    patch: int = 14
    vision_layers: int = 3
    vision_hidden: int = 64
    vision_head_dim: int = 32
    text: int = 32
    picture: tuple[int, int] = (640, 480)
    seed: int = 0

    @property
    def visual_tokens(self) -> int:
        """Visual rows of one image."""
        return (self.image // self.patch) ** 2

    def question(self, text: int) -> str:
        """A question that makes `text` text rows with `<s> USER: ... ASSISTANT:` around it."""
        words = _left(text, TEXT_BEFORE_IMAGE + 1)
        return " ".join(
            word(len(SPECIAL) + 37 * index % (self.vocab - len(SPECIAL))) for index in range(words)
        )

    def model_spec(self) -> ModelSpec:
        """The ModelSpec of this geometry, for any weights."""
        same = {
            f: getattr(self, f) for f in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")
        }
        return ModelSpec(family="llava", visual_tokens=self.visual_tokens, **same)


class Described(Value, frozen=True, kw_only=True):
    """A published model's geometry, from its description in `trimvlm_tools.random_checkpoint`, in float32.

    Attributes:
        description: its name there.
        around: text rows that the model's template puts around a question.
        picture, grid: its size in pixels, and the visual tokens that it covers (`trimvlm.profile`).
        text, seed: as for `Geometry`.
    """

    name: str
    description: str
    around: int
    picture: tuple[int, int]
    grid: Grid
    text: int = 32
    seed: int = 0

    def question(self, text: int) -> str:
        """A question that makes `text` text rows: the tokenizer of a described model knows letters only."""
        return "".join("abcdefghij"[index % 10] for index in range(_left(text, self.around)))

    def model_spec(self) -> ModelSpec:
        """The ModelSpec for the picture, for any weights."""
        return _described_spec(self)


AnyGeometry: TypeAlias = Geometry | Described

GEOMETRIES: dict[str, AnyGeometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry(
            name="llava-1b", layers=16, hidden=2048, heads=16, kv_heads=16, head_dim=128, ffn=5504,
            vocab=32064, vision_layers=24, vision_hidden=1024, vision_head_dim=64,
        ),
        # One tile beside the whole image: 27 * 27 + 27 * 28 visual tokens.
        Described(
            name="onevision-0.5b", description="llava-onevision-qwen2-0.5b", around=19, picture=(384, 384),
            grid=(27, 27),
        ),
        Geometry(name="d1024"),
        # Seconds instead of minutes: for trying the command out, not for figures.
        Geometry(
            name="tiny", layers=8, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=160,
            image=56, vision_hidden=32, text=12,
        ),
    )
}  # fmt: skip


def find_geometry(name: str) -> AnyGeometry:
    """The geometry of that name.

    Raises:
        UserError: there is none.
    """
    if name not in GEOMETRIES:
        raise UserError(f"--geometry: {name!r} is not known; choose from {', '.join(sorted(GEOMETRIES))}")
    return GEOMETRIES[name]


def make_checkpoint(geometry: AnyGeometry, directory: Path) -> Path:
    """Writes the checkpoint to `directory` (fp32 safetensors, tokenizer, processor), or finds it there.

    The directory also holds `geometry.json`; a checkpoint of another geometry or seed is made again.
    """
    stamp = directory / GEOMETRY_FILE
    encoded = msgspec.json.encode(geometry)
    if stamp.is_file() and stamp.read_bytes() == encoded:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    if isinstance(geometry, Described):
        described.make_checkpoint(load(geometry.description), directory, dtype="float32", seed=geometry.seed)
    else:
        _write(geometry, directory)
    stamp.write_bytes(encoded)  # last: without it the directory counts as not made
    return directory


def _write(geometry: Geometry, directory: Path) -> None:
    from transformers import GenerationConfig

    directory.mkdir(parents=True)
    with quiet():
        config = make_config(geometry)
        config.save_pretrained(directory)
        GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS).save_pretrained(directory)
        make_processor(geometry).save_pretrained(directory)
        write(directory, tensors(config), "float32", geometry.seed, math.inf)


def _left(text: int, around: int) -> int:
    """Rows for a question.

    Raises:
        UserError: there are none.
    """
    if text <= around:
        raise UserError(f"--text: {text} rows leave none for a question; give at least {around + 1}")
    return text - around


@cache
def _described_spec(geometry: Described) -> ModelSpec:
    from transformers import AutoConfig

    from trimvlm_export import families

    content = dict(load(geometry.description).config)
    kind = content.pop("model_type")
    with quiet():
        config = AutoConfig.for_model(kind, **content)
    return families.of(kind).model_spec(config, None, geometry.grid)
