"""The file of quantised weights: which matrices of a graph it holds, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trimvlm.target import Weights
from trimvlm_engines.quantizing.codes import pack, quantize
from trimvlm_engines.weight_files import Place, layout

CHUNK = 1 << 24  # values that are quantised at a time
# Types of weights, and of their scales: what the graph computes in.
TYPES: dict[int, tuple[str, np.dtype[Any]]] = {
    TensorProto.FLOAT: ("F32", np.dtype(np.float32)),
    TensorProto.FLOAT16: ("F16", np.dtype(np.float16)),
    TensorProto.BFLOAT16: ("BF16", helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)),
}

Form = Literal["matmul", "dequantize"]
# Matrices of a layer that read the same rows lie together, so that they can be read as one; a profile may
# compute queries of fewer rows than keys and values.
TOGETHER = ("k_proj.weight", "v_proj.weight", "q_proj.weight")


class Matrix(NamedTuple):
    """A weight [rows, width] of a Gemm, in the bundle's weight files; `kind` is ONNX's type.

    `block` consecutive values of a row share a scale; the last block of a row may have fewer. In blocks of 1
    it is not quantised.
    """

    name: str
    kind: int
    rows: int
    width: int
    location: str
    offset: int
    block: int

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.width // self.block)

    def read(self, directory: Path) -> NDArray[Any]:
        """[rows, width], mapped."""
        dtype = TYPES[self.kind][1]
        return np.memmap(directory / self.location, dtype, "r", self.offset, (self.rows, self.width))


def gemm_weights(model: onnx.ModelProto) -> Iterator[Matrix]:
    """Weights of the graph's Gemms, as they are in the bundle."""
    read = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    for tensor in model.graph.initializer:
        if tensor.name not in read or tensor.data_location != TensorProto.EXTERNAL or len(tensor.dims) != 2:
            continue
        if tensor.data_type in TYPES:
            said = {entry.key: entry.value for entry in tensor.external_data}
            (rows, width), offset = tensor.dims, int(said.get("offset", 0))
            yield Matrix(tensor.name, tensor.data_type, rows, width, said["location"], offset, block=1)


def matrices(model: onnx.ModelProto, weights: Weights, form: Form) -> tuple[Matrix, ...]:
    """What is quantised; for `dequantize` in blocks that fit, and without those that none fits."""
    found: list[Matrix] = []
    for each in gemm_weights(model):
        block = weights.block if form == "matmul" else weights.block_of(each.width)
        if block:
            found.append(each._replace(block=block))
    return tuple(sorted(found, key=_order))  # the same file for graphs with the same matrices


def _order(matrix: Matrix) -> tuple[str, int]:
    prefix, _, last = matrix.name.rpartition(".self_attn.")
    return (prefix, TOGETHER.index(last)) if last in TOGETHER else (matrix.name, 0)


def _group(matrix: Matrix) -> tuple[str, int, int, int]:
    return _order(matrix)[0], matrix.kind, matrix.width, matrix.block


class Store:
    """A file of quantised weights (safetensors), made or to be made.

    Its tensors are `<weight>.codes` [rows, bytes of whole blocks] and `<weight>.scales` [rows, blocks].

    Attributes:
        name: of the file in the bundle.
        weights, form: how they are quantised, and for which operator.
        groups: the matrices. Those of a group lie as one matrix would: codes of all, then scales of all.
    """

    def __init__(self, name: str, weights: Weights, form: Form, matrices: tuple[Matrix, ...]) -> None:
        self.name, self.weights, self.form, self.matrices = name, weights, form, matrices
        self.groups = [tuple(group) for _, group in groupby(matrices, _group)]

    @property
    def said(self) -> dict[str, Any]:
        """What an Engine's options say of it."""
        return {"quantized": {**msgspec.to_builtins(self.weights), "file": self.name}}

    @cached_property
    def _header(self) -> tuple[bytes, dict[str, Place]]:
        def tensors() -> Iterator[tuple[str, str, Sequence[int], int]]:
            for group in self.groups:
                kind, dtype = TYPES[group[0].kind]
                for part, stored, width, size in (
                    ("codes", "U8", group[0].blocks * group[0].block * self.weights.bits // 8, 1),
                    ("scales", kind, group[0].blocks, dtype.itemsize),
                ):
                    for each in group:
                        yield f"{each.name}.{part}", stored, (each.rows, width), each.rows * width * size

        return layout(tensors())

    def place(self, name: str) -> Place:
        """Of a tensor."""
        return self._header[1][name]

    def joined(self, parts: Sequence[Matrix]) -> Matrix:
        """Matrices of a group, from its first on, as one, which `place` knows from now on."""
        made = parts[0]._replace(name="+".join(each.name for each in parts), rows=sum(p.rows for p in parts))
        for kind in ("codes", "scales"):
            places = [self.place(f"{each.name}.{kind}") for each in parts]
            whole = Place(places[0].offset, sum(place.length for place in places))
            self._header[1][f"{made.name}.{kind}"] = whole
        return made

    def write(self, put: Callable[[bytes | memoryview], int], directory: Path) -> None:
        """Quantises the matrices of the bundle in `directory` one by one, each a part at a time."""
        put(self._header[0])
        signed = self.form == "dequantize"
        for group in self.groups:
            scales: list[bytes] = []
            for codes, scale in chain.from_iterable(self._parts(each, directory) for each in group):
                put(np.ascontiguousarray(pack(codes, self.weights.bits, signed=signed)).tobytes())
                scales.append(scale.tobytes())
            for scale in scales:
                put(scale)

    def _parts(self, matrix: Matrix, directory: Path) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any]]]:
        values, rows = matrix.read(directory), max(1, CHUNK // matrix.width)
        for start in range(0, matrix.rows, rows):
            part = np.asarray(values[start : start + rows]).astype(np.float32)
            yield quantize(part, self.weights.bits, matrix.block, TYPES[matrix.kind][1])
