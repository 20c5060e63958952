"""A Hugging Face checkpoint directory as data: where every tensor lies, and nothing executed.

Tensors are found by reading the safetensors headers; they are consumed one by one through
`Checkpoint.take`, and what nobody took must be listed as ignored with a reason.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimvlm.encoder_rules import Tower
from trimvlm.errors import UserError
from trimvlm.profile import Grid, ModelSpec
from trimvlm_export.hashes import weight_hash

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies: `length` bytes from `offset` of `file` (row-major, little-endian)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read_header(file: Path) -> list[Tensor]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises:
        UserError: not a safetensors file, or a dtype other than float32, float16 and bfloat16.
    """
    with file.open("rb") as stream:
        size_bytes = stream.read(8)
        size = struct.unpack("<Q", size_bytes)[0] if len(size_bytes) == 8 else -1
        if not 0 < size < 100_000_000:
            raise UserError(f"{file}: not a safetensors file (header of {size} bytes)")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise UserError(f"{file}: not a safetensors file: {error}") from None
    total, tensors = file.stat().st_size - 8 - size, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, end = entry["data_offsets"]
        if end > total:
            raise UserError(
                f"{file}: {name} ends at byte {end} of {total}; the file is cut short, fetch it again"
            )
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) or str(entry["dtype"])
        tensors.append(
            Tensor(
                name=name,
                file=file,
                dtype=dtype,
                shape=tuple(entry["shape"]),
                offset=8 + size + first,
                length=end - first,
            )
        )
    return sorted(tensors, key=lambda tensor: tensor.offset)


def weight_files(directory: Path) -> list[Path]:
    """The checkpoint's safetensors files, in name order.

    Raises:
        UserError: no such directory, no configuration or no safetensors in it, or a shard missing.
    """
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory}: no model here (config.json is missing); "
            "give the directory of a Hugging Face checkpoint"
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = [
            directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files and (pickled := sorted(directory.glob("pytorch_model*.bin"))):
        raise UserError(
            f"{directory}: only pickled weights here ({pickled[0].name}), which are never read; convert each "
            "file where you trust it: safetensors.torch.save_file(torch.load('pytorch_model.bin', "
            "weights_only=True), 'model.safetensors')"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise UserError(
            f"{directory}: {'shard ' + missing[0] + ' is missing' if missing else 'no *.safetensors here'}; "
            "download the checkpoint again (pickled .bin weights are never read)"
        )
    return files


def fingerprint(directory: Path) -> str:
    """SHA-256 over the SHA-256 of each weight file, in name order."""
    import hashlib

    digest = hashlib.sha256()
    for file in weight_files(directory):
        digest.update(weight_hash(file).encode())
    return digest.hexdigest()


class TensorMap:
    """Strict map from module parameter names to the tensors of a checkpoint.

    Args:
        tensors: everything in the checkpoint.
        canonical: from a name in the checkpoint to the module's parameter name.
    """

    def __init__(self, tensors: Iterable[Tensor], canonical: Callable[[str], str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for tensor in tensors:
            name = canonical(tensor.name)
            if name in self.tensors:
                raise UserError(f"{tensor.file}: {tensor.name} and {self.tensors[name].name} are both {name}")
            self.tensors[name] = tensor
        self.taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor for a parameter, which is consumed (more than once if weights are tied).

        Raises:
            UserError: missing, or of another shape.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(f"the checkpoint has no tensor for {name} {list(shape)}")
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.file.name}: {tensor.name} is {list(tensor.shape)}, the model needs {list(shape)}"
            )
        self.taken.add(name)
        return tensor

    def rest(self, ignored: Callable[[str], str | None]) -> dict[str, str]:
        """Names in the checkpoint of what was not taken, each with the reason why it is not needed.

        Raises:
            UserError: a tensor that nobody took and that `ignored` gives no reason for.
        """
        reasons = {}
        for name in sorted(set(self.tensors) - self.taken):
            reason = ignored(name)
            if reason is None:
                raise UserError(
                    f"{self.tensors[name].file.name}: {self.tensors[name].name} is not used by the exported "
                    "model and not known to be unneeded; config.json describes another kind of checkpoint"
                )
            reasons[self.tensors[name].name] = reason
        return reasons


def load_config(directory: Path) -> Any:
    """transformers' configuration object of a checkpoint whose weights are all there.

    Raises:
        UserError: as `weight_files` and `read_config`.
    """
    weight_files(directory)
    return read_config(directory)


def read_config(directory: Path) -> Any:
    """transformers' configuration object; code that a checkpoint may bring is never executed.

    Raises:
        UserError: a configuration that is none, or a model type that transformers or trimvlm does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from trimvlm_export import families

    try:  # a family that transformers does not have tells it about itself when it is imported
        families.of(json.loads((directory / "config.json").read_text()).get("model_type"))
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{directory}: config.json cannot be used: {reason}") from None


def model_spec(directory: Path | str, grid: Grid | None = None) -> ModelSpec:
    """Geometry and fingerprint of a checkpoint, for images that make `grid`.

    Raises:
        UserError: no model there, a family that trimvlm does not know, or a grid that it cannot make.
    """
    from trimvlm_export import families

    config = load_config(Path(directory))
    return families.of(config.model_type).model_spec(config, fingerprint(Path(directory)), grid)


def tower(directory: Path | str, grid: Grid | None = None) -> Tower:
    """The vision tower of a checkpoint.

    Raises:
        UserError: no model there, or a tower or family that trimvlm does not know.
    """
    from trimvlm_export import families

    config = load_config(Path(directory))
    return families.of(config.model_type).tower(config, grid)
