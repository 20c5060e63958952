"""The matrices of a graph's products, as they lie in the bundle's weight files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

CHUNK = 1 << 24  # values that are read at a time
# Types of weights, safetensors' and numpy's.
TYPES: dict[int, tuple[str, np.dtype[Any]]] = {
    TensorProto.FLOAT: ("F32", np.dtype(np.float32)),
    TensorProto.FLOAT16: ("F16", np.dtype(np.float16)),
    TensorProto.BFLOAT16: ("BF16", helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)),
}


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, width] of a Gemm, in the bundle's weight files; `kind` is ONNX's type."""

    name: str
    kind: int
    rows: int
    width: int
    location: str
    offset: int

    def parts(self, directory: Path) -> Iterator[NDArray[Any]]:
        """[some of its rows, width] at a time, mapped."""
        shape, rows = (self.rows, self.width), max(1, CHUNK // self.width)
        values = np.memmap(directory / self.location, TYPES[self.kind][1], "r", self.offset, shape)
        for start in range(0, self.rows, rows):
            yield values[start : start + rows]


def gemm_weights(model: onnx.ModelProto) -> Iterator[Matrix]:
    """Weights of the graph's Gemms, as they are in the bundle."""
    read = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    for tensor in model.graph.initializer:
        if tensor.name not in read or tensor.data_location != TensorProto.EXTERNAL or len(tensor.dims) != 2:
            continue
        if tensor.data_type in TYPES:
            said = {entry.key: entry.value for entry in tensor.external_data}
            (rows, width), offset = tensor.dims, int(said.get("offset", 0))
            yield Matrix(tensor.name, tensor.data_type, rows, width, said["location"], offset)
