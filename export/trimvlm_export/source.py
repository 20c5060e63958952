"""A checkpoint whose files lie in a bundle, ready to be exported from."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from trimvlm.bundle import Dtype, write_whole
from trimvlm_export import families
from trimvlm_export.checkpoint import Tensor, TensorMap, load_config, read_header, weight_files
from trimvlm_export.processing import TOKENIZER, tokenizer_json
from trimvlm_export.weights import mapped, place

CHECKPOINT = "checkpoint"  # the checkpoint itself, inside the bundle: weights, tokenizer, configuration


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the graphs are made from.

    Attributes:
        out: the bundle's directory.
        dtype: precision of the weights there.
        config: transformers' configuration of the whole model.
        family: its module of `trimvlm_export.families`.
        tensors: the weights in the bundle, by transformers' parameter names.
        files: what was placed, relative to `out`.
    """

    out: Path
    dtype: Dtype
    config: Any
    family: ModuleType
    tensors: TensorMap
    files: tuple[str, ...]

    @classmethod
    def place(cls, checkpoint: Path, out: Path, dtype: Dtype, *, proven: bool = False) -> Source:
        """Puts the weights (linked, or converted) and the small files of a checkpoint into a bundle.

        `out/checkpoint` is then itself a directory that transformers loads.

        Args:
            proven: the checkpoint's tokenizer is known to be right.
        """
        config = load_config(checkpoint)
        family = families.of(config.model_type)
        directory = out / CHECKPOINT
        directory.mkdir(parents=True, exist_ok=True)
        weights = [place(file, directory, dtype) for file in weight_files(checkpoint)]
        small = small_files(checkpoint)
        for file in small:
            shutil.copyfile(file, directory / file.name)
        names = [file.name for file in [*weights, *small]]
        if not proven and (tokenizer := tokenizer_json(checkpoint)):
            write_whole(directory / TOKENIZER, tokenizer.encode())
            names += [TOKENIZER] * (TOKENIZER not in names)
        return cls(
            out=out,
            dtype=dtype,
            config=config,
            family=family,
            tensors=map_tensors((t for file in weights for t in read_header(file)), family, config),
            files=tuple(f"{CHECKPOINT}/{name}" for name in names),
        )

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors among `files`."""
        return tuple(name for name in self.files if name.endswith(".safetensors"))

    def load(self, module: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
        """Gives `module` its parameters as views of the weight files. Nothing is copied.

        Args:
            names: the module's parameter names to transformers' names.

        Returns:
            The module's parameter names to where their bytes are.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        parameters = dict(module.named_parameters())
        found = {
            name: self.tensors.take(whole, tuple(parameters[name].shape)) for name, whole in names.items()
        }
        module.load_state_dict({k: mapped(t) for k, t in found.items()}, strict=False, assign=True)
        return found

    def ignored(self) -> dict[str, str]:
        """Checkpoint tensors that no graph uses, with the reason.

        Raises:
            UserError: a tensor that should have been used.
        """
        return self.tensors.rest(lambda name: self.family.unused(self.config, name))


def small_files(checkpoint: Path) -> list[Path]:
    """What a checkpoint has beside its weights, and a bundle copies."""
    return [f for f in sorted(checkpoint.iterdir()) if f.suffix in {".json", ".jinja"} and f.is_file()]


def map_tensors(tensors: Iterable[Tensor], family: ModuleType, config: Any) -> TensorMap:
    """A checkpoint's tensors by transformers' names. `config` learns whether the LM head is really tied.

    Raises:
        UserError: two tensors of one name.
    """
    found = TensorMap(tensors, family.canonical)
    if f"{family.LM_HEAD}weight" in found.tensors:
        config.tie_word_embeddings = False  # as transformers has it, whatever the configuration says
    return found
