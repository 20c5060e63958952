"""One copy of the weights: the checkpoint's own safetensors files inside the bundle.

In the checkpoint's precision the files are hard-linked (copied across file systems). Another precision is
converted tensor by tensor, so that memory holds one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import tempfile
from pathlib import Path

import torch

from trimvlm.bundle import Dtype
from trimvlm.errors import UserError
from trimvlm_export.checkpoint import Tensor, read_header

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Precisions of a larger range, for values that one cannot hold.
_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}


def place(file: Path, directory: Path, dtype: Dtype) -> Path:
    """Puts one weight file into `directory` in the wanted precision; kept if it is there already.

    Raises:
        UserError: a value that the precision cannot hold.
    """
    target = directory / file.name
    tensors = read_header(file)
    if all(tensor.dtype == dtype for tensor in tensors):
        if not (target.exists() and target.samefile(file)):
            link(file, target)
    elif not (target.exists() and _same_conversion(file, target)):
        _convert(tensors, target, dtype, source=file)
    return target


def link(file: Path, target: Path) -> None:
    """Gives a file a second place, whole or not at all: hard-linked, or copied across file systems."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        temporary = Path(scratch) / file.name
        try:
            os.link(file.resolve(), temporary)
        except OSError:
            shutil.copyfile(file, temporary)
        temporary.replace(target)


def _stamp(file: Path) -> str:
    """What a conversion was made from: size and modification time of the source."""
    stat = file.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def _same_conversion(file: Path, target: Path) -> bool:
    with target.open("rb") as stream:
        size = struct.unpack("<Q", stream.read(8))[0]
        return json.loads(stream.read(size)).get("__metadata__", {}).get("converted_from") == _stamp(file)


def _convert(tensors: list[Tensor], target: Path, dtype: Dtype, *, source: Path) -> None:
    width = _TORCH[dtype].itemsize
    header: dict[str, object] = {"__metadata__": {"format": "pt", "converted_from": _stamp(source)}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * width
        header[tensor.name] = {
            "dtype": _SAFETENSORS[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 64)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            for tensor in tensors:
                given = mapped(tensor)
                converted = given.to(_TORCH[dtype])
                if not torch.isfinite(converted).all():
                    raise UserError(f"{source.name}: {tensor.name} {_wrong_with(given, dtype)}")
                stream.write(converted.reshape(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _wrong_with(given: torch.Tensor, dtype: Dtype) -> str:
    """Why a tensor is not finite after its conversion."""
    if not torch.isfinite(given).all():
        return "has values that are not finite; the checkpoint is damaged, fetch it again"
    return f"has values that {dtype} cannot hold; export in {_WIDER[dtype]}"


def mapped(tensor: Tensor) -> torch.Tensor:
    """The tensor as a read-only view of its file: no memory of its own.

    Raises:
        UserError: a dtype that is not a float.
    """
    if tensor.dtype not in _TORCH:
        raise UserError(
            f"{tensor.file.name}: {tensor.name} is {tensor.dtype}; supported: {', '.join(_TORCH)}"
        )
    whole = torch.from_file(
        str(tensor.file), shared=False, size=tensor.file.stat().st_size, dtype=torch.uint8
    )
    data = whole[tensor.offset : tensor.offset + tensor.length]
    if tensor.offset % _TORCH[tensor.dtype].itemsize:
        data = data.clone()  # a view needs aligned bytes, which old writers did not care for
    return data.view(_TORCH[tensor.dtype]).view(tensor.shape)
