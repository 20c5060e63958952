"""The decoder of a vision-language checkpoint by itself: its config and weights under their plain names.

Needs numpy only: every peer's environment has it. Weights are read where they lie, one at a time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_CHUNK = 64 << 20


@dataclass(frozen=True)
class Tensor:
    """A weight in a safetensors file: dtype as there (`F32`, `F16`, `BF16`), bytes [start, end)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def read(self) -> NDArray[np.float32]:
        """Its values in float32; a read-only view of the file where they are that already."""
        import numpy as np

        stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.dtype]
        values = np.memmap(self.file, stored, "r", self.start, self.shape)
        if self.dtype == "BF16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class PlainDecoder:
    """A decoder alone.

    Attributes:
        config: of a plain causal language model; `tie_word_embeddings`: whether the head is the embedding.
        tensors: `model.embed_tokens.weight`, `model.layers.0...`, `model.norm.weight` and, untied,
            `lm_head.weight`.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies.

        Raises:
            ValueError: they are scaled, which the peers' conversions here do not cover.
        """
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"rope type {kind!r}: only default is converted")
        return float(rope.get("rope_theta") or self.config["rope_theta"])

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]


def read_decoder(checkpoint: Path) -> PlainDecoder:
    """Finds the decoder in a checkpoint's files.

    Raises:
        ValueError: it is neither a Llama nor a Qwen2, or the files hold no decoder.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    text = dict(config.get("text_config", config))
    if text.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"decoder {text.get('model_type')!r}: only {', '.join(ARCHITECTURES)} are converted")
    stored = {
        name: tensor for path in sorted(checkpoint.glob("*.safetensors")) for name, tensor in _read(path)
    }
    roots = [name.removesuffix(_EMBEDDING) for name in stored if name.endswith(f".{_EMBEDDING}")]
    heads = [name for name in stored if name == _HEAD or name.endswith(f".{_HEAD}")]
    if len(roots) != 1 or len(heads) > 1:
        raise ValueError(f"{checkpoint}: embeddings {roots}, heads {heads}: not one decoder")
    (root,) = roots
    tensors = {f"model.{name.removeprefix(root)}": stored[name] for name in stored if name.startswith(root)}
    tied = not heads or bool(text.get("tie_word_embeddings"))
    if not tied:
        tensors[_HEAD] = stored[heads[0]]
    own = {"architectures": [ARCHITECTURES[text["model_type"]]], "tie_word_embeddings": tied}
    return PlainDecoder(config=text | own, tensors=tensors)


def write_decoder(decoder: PlainDecoder, checkpoint: Path, directory: Path) -> None:
    """Writes a plain checkpoint: config, weights, and the tokenizer's files of `checkpoint`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(decoder.config, indent=2), "utf-8")
    for name in _TOKENIZER:
        if (checkpoint / name).is_file():
            (directory / name).write_bytes((checkpoint / name).read_bytes())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in decoder.tensors.items():
        start, end = end, end + tensor.end - tensor.start
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (directory / "model.safetensors").open("wb") as output:
        output.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in decoder.tensors.values():
            _copy(tensor, output.write)


def _read(path: Path) -> list[tuple[str, Tensor]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    base = 8 + size
    return [
        (
            name,
            Tensor(path, of["dtype"], tuple(of["shape"]), *(base + offset for offset in of["data_offsets"])),
        )
        for name, of in header.items()
    ]


def _copy(tensor: Tensor, write: Callable[[bytes], Any]) -> None:
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.end - tensor.start
        while left:
            chunk = file.read(min(left, _CHUNK))
            write(chunk)
            left -= len(chunk)
