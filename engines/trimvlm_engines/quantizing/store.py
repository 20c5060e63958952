"""The file of quantised weights: which matrices of a graph it holds, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from trimvlm.target import Weights
from trimvlm_engines.matrices import TYPES, Matrix, gemm_weights
from trimvlm_engines.quantizing.codes import pack, quantize
from trimvlm_engines.weight_files import Place, layout

Form = Literal["matmul", "dequantize"]
# Matrices of a layer that read the same rows lie together, so that they can be read as one; a profile may
# compute queries of fewer rows than keys and values.
TOGETHER = ("k_proj.weight", "v_proj.weight", "q_proj.weight")


@dataclass(frozen=True)
class Blocked(Matrix):
    """A matrix of which `block` consecutive values of a row share a scale; the last block may have fewer."""

    block: int

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.width // self.block)


def blocked_matrices(model: onnx.ModelProto, weights: Weights, form: Form) -> tuple[Blocked, ...]:
    """What is quantised; for `dequantize` in blocks that fit, and without those that none fits."""
    found: list[Blocked] = []
    for each in gemm_weights(model):
        block = weights.block if form == "matmul" else weights.block_of(each.width)
        if block:
            found.append(Blocked(**vars(each), block=block))
    return tuple(sorted(found, key=_order))  # the same file for graphs with the same matrices


def _order(matrix: Blocked) -> tuple[str, int]:
    prefix, _, last = matrix.name.rpartition(".self_attn.")
    return (prefix, TOGETHER.index(last)) if last in TOGETHER else (matrix.name, 0)


def _group(matrix: Blocked) -> tuple[str, int, int, int]:
    return _order(matrix)[0], matrix.kind, matrix.width, matrix.block


class Store:
    """A file of quantised weights (safetensors), made or to be made.

    Its tensors are `<weight>.codes` [rows, bytes of whole blocks] and `<weight>.scales` [rows, blocks].

    Attributes:
        name: of the file in the bundle.
        weights, form: how they are quantised, and for which operator.
        groups: the matrices. Those of a group lie as one matrix would: codes of all, then scales of all.
    """

    def __init__(self, name: str, weights: Weights, form: Form, matrices: tuple[Blocked, ...]) -> None:
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

    def joined(self, parts: Sequence[Blocked]) -> Blocked:
        """Matrices of a group, from its first on, as one, which `place` knows from now on."""
        name, rows = "+".join(each.name for each in parts), sum(each.rows for each in parts)
        made = replace(parts[0], name=name, rows=rows)
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

    def _parts(self, matrix: Blocked, directory: Path) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any]]]:
        for part in matrix.parts(directory):
            yield quantize(part.astype(np.float32), self.weights.bits, matrix.block, TYPES[matrix.kind][1])
