"""Files of weights that a build makes in a bundle (safetensors), and how a graph reads them.

Builds of a bundle that want the same matrices in the same form share one file: its name has a digest of what
goes into it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from trimvlm.bundle import Bundle, Manifest
from trimvlm_engines import record

if TYPE_CHECKING:
    import onnx

    from trimvlm_engines.matrices import Matrix

log = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes of a file's header are a multiple of it


class Place(NamedTuple):
    """Where a tensor is in the file, in bytes."""

    offset: int
    length: int


class WeightFile(Protocol):
    """A file of weights, made or to be made.

    Attributes:
        name: of the file in the bundle.
        said: what an Engine's options say of it, under the kind of file that it is.
    """

    name: str

    @property
    def said(self) -> dict[str, Any]: ...

    def write(self, put: Callable[[bytes | memoryview], int], directory: Path) -> None:
        """Makes it of the weights of the bundle in `directory`."""


def layout(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> tuple[bytes, dict[str, Place]]:
    """The header of a file and where its tensors are.

    Args:
        tensors: name, safetensors' type, shape and bytes of each, in their order.
    """
    said: dict[str, Any] = {}
    end = 0
    for name, dtype, shape, length in tensors:
        begin, end = end, end + length
        said[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    places = {
        name: Place(8 + len(text) + begin, end - begin)
        for name, where in said.items()
        for begin, end in [where["data_offsets"]]
    }
    return len(text).to_bytes(8, "little") + text, places


def external(file: str, place: Place, name: str, kind: int, shape: Sequence[int]) -> onnx.TensorProto:
    """A tensor of a graph that lies in a file; `kind` is ONNX's type."""
    from onnx import TensorProto

    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def digest(manifest: Manifest, scheme: int, matrices: Iterable[Matrix]) -> str:
    """Of what goes into a file: the rule's number and each matrix with its source's hash."""
    sources = [scheme, *((*astuple(each), manifest.files[each.location].sha256) for each in matrices)]
    return hashlib.sha256(msgspec.json.encode(sources)).hexdigest()[:12]


def ensure(bundle: Bundle, file: WeightFile) -> Bundle:
    """Makes and records a file that the bundle does not have yet; returns the bundle with it."""
    directory = bundle.directory
    (kind,) = file.said
    with record.building(directory, kind):
        bundle = record.open_bundle(directory)
        if file.name in bundle.manifest.files:
            return bundle
        log.info("%s: writing", file.name)
        with record.PlanFile(directory / file.name) as sink:
            file.write(sink.write, directory)

        def add(manifest: Manifest) -> Manifest:
            return msgspec.structs.replace(manifest, files={**manifest.files, file.name: sink.file})

        record.change_manifest(directory, add, [sink])
    return Bundle(directory)
