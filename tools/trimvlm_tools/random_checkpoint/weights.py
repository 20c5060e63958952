"""Writes the weight files of a model that is never in memory: names and shapes come from its class."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools.random_checkpoint.description import Dtype
from trimvlm_tools.random_checkpoint.values import SMALL, RandomTensor, stream

CODES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2)}
INDEX = "model.safetensors.index.json"


def tensors(config: Any) -> list[RandomTensor]:
    """What transformers 5 would save of a model of this configuration, tied tensors once.

    Args:
        config: transformers' configuration of a model of images and text.

    Raises:
        UserError: not such a model.
    """
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
    except ValueError as error:
        raise UserError(f"config: transformers makes no model of it: {str(error).splitlines()[0]}") from None
    _initialise_vectors(model)
    parameters = dict(model.named_parameters())
    saved = revert_weight_conversion(model, parameters)
    assert {id(p) for p in saved.values()} == {id(p) for p in parameters.values()}, "tensors were converted"
    return [_random_tensor(name, parameter) for name, parameter in saved.items()]


def rename(found: Iterable[RandomTensor], patterns: Sequence[tuple[str, str]]) -> list[RandomTensor]:
    """The same values under other names: every pattern is replaced, in order.

    Raises:
        UserError: a pattern that no name has, or two tensors of one name.
    """
    found = list(found)
    names = [tensor.name for tensor in found]
    for pattern, replacement in patterns:
        renamed = [re.sub(pattern, replacement, name) for name in names]
        if renamed == names:
            raise UserError(f"published_names: {pattern!r} is in no tensor's name; correct it or take it out")
        names = renamed
    if len(set(names)) < len(names):
        raise UserError("published_names: two tensors get the same name; make the patterns narrower")
    return [replace(tensor, name=name) for name, tensor in zip(names, found, strict=True)]


def write(
    directory: Path, found: Sequence[RandomTensor], dtype: Dtype, seed: int, shard_bytes: float
) -> list[Path]:
    """Writes `model.safetensors`, or shards of at most `shard_bytes` with their index.

    Values depend on seed and name, not on the shards.

    Returns:
        The weight files, in order.
    """
    width = CODES[dtype][1]
    shards: list[list[RandomTensor]] = [[]]
    filled = 0
    for tensor in found:
        if shards[-1] and filled + tensor.elements * width > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.elements * width
    files = [directory / f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        files = [directory / "model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        _write_file(file, shard, dtype, seed)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": width * sum(tensor.elements for tensor in found)},
            "weight_map": {
                tensor.name: file.name for file, shard in zip(files, shards, strict=True) for tensor in shard
            },
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _write_file(file: Path, found: Sequence[RandomTensor], dtype: Dtype, seed: int) -> None:
    """A safetensors file: size of the header, header, then the tensors without gaps."""
    code, width = CODES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in found:
        end = offset + tensor.elements * width
        header[tensor.name] = {"dtype": code, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in found:
            for piece in stream(tensor, dtype, seed):
                while piece:  # one write is at most 2 GiB and may be short
                    piece = piece[out.write(piece) :]  # noqa: PLW2901


def _initialise_vectors(model: Any) -> None:
    """Gives vectors the values of the model's own initialisation; matrices stay without memory."""
    import torch

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1:
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32)))
    model.initialize_weights()


def _random_tensor(name: str, parameter: Any) -> RandomTensor:
    shape = tuple(parameter.shape)
    rows, *rest = [size for size in shape if size > 1] or [1]
    if rest:
        mean, deviation = 0.0, (parameter.numel() / rows) ** -0.5
    else:
        vector = parameter.detach()
        constant = vector.device.type == "cpu" and bool((vector == vector[0]).all())
        mean, deviation = (float(vector[0]) if constant else 0.0), SMALL
    return RandomTensor(name=name, drawn_as=name, shape=shape, mean=mean, deviation=deviation)
