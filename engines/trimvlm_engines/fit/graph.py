"""An ONNX graph with sizes put in: shape and bytes of every value. No weights are read, nothing is run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from trimvlm.errors import UserError
from trimvlm_engines.fit.outcomes import MATMUL_N_BITS, SMALL, Kind, Outcomes, Shape

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

_LAYER = re.compile(r"(?:^|\.)(?:layers?|blocks)\.(\d+)\.")


class Tensor(NamedTuple):
    """A value of the graph: its shape and the bytes of one of its elements."""

    shape: Shape
    item: int

    @property
    def bytes(self) -> int:
        """Bytes of the whole value."""
        return math.prod(self.shape) * self.item


class Node(NamedTuple):
    """One operator.

    Attributes:
        inputs, outputs: names; of an input that is left out, none.
        layer: layer of the model whose weights it, or the last node before it, reads; None: of no layer.
        flops: 2 per multiply-accumulate of matrices, convolutions and attention; 0 for all else.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layer: int | None
    flops: int


class Weight(NamedTuple):
    """An initialiser in another file.

    Attributes:
        place: file and offset.
        bytes: all of it.
        looked_up: rows of it are looked up, and nothing reads it whole.
    """

    place: tuple[str, int]
    bytes: int
    looked_up: bool


class Sized(NamedTuple):
    """A graph for given shapes of its inputs; `tensors` holds every value but the constants."""

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]


class Graph:
    """An ONNX graph.

    Args:
        path: its file, for messages too.
        made: its bytes, where it is in no file yet.
        float_bytes: bytes that every float is taken to have; None: those of its type.

    Attributes:
        inputs: dimensions of each input; a text is a symbolic size.
        outputs: names.
        weights: by name.
        nodes: how many.

    Raises:
        UserError: no ONNX file.
    """

    def __init__(self, path: Path, made: bytes | None = None, *, float_bytes: int | None = None) -> None:
        try:
            model = onnx.load_from_string(made) if made else onnx.load(str(path), load_external_data=False)
        except Exception as error:  # noqa: BLE001 protobuf's own class, which onnx does not name
            raise UserError(f"{path}: not an ONNX graph ({error}); export it again") from None
        self.path, self._model = path, model
        self._float_bytes = float_bytes
        self._outcomes = Outcomes(path, model)
        self.inputs = {
            value.name: tuple(
                size.dim_value if size.HasField("dim_value") else size.dim_param
                for size in value.type.tensor_type.shape.dim
            )
            for value in model.graph.input
        }
        self.outputs = tuple(value.name for value in model.graph.output)
        self.nodes = len(model.graph.node)
        whole = {name for node in model.graph.node for name in _read_whole(node)}
        self.weights = {
            tensor.name: Weight(
                place=_place(tensor), bytes=self._bytes_of(tensor), looked_up=tensor.name not in whole
            )
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights; those that several names point to count once."""
        return sum({weight.place: weight.bytes for weight in self.weights.values()}.values())

    def sized(self, shapes: Mapping[str, Shape]) -> Sized:
        """Every node and value for these shapes of the inputs.

        Raises:
            UserError: sizes that do not follow from the shapes alone, naming the node.
        """
        kinds, values = self._given(shapes)
        nodes: list[Node] = []
        layer: int | None = None
        for number, node in enumerate(self._model.graph.node):
            found, computed = self._outcomes.of(number, kinds, values)
            kinds.update(found)
            values.update(computed)
            read = [name for name in node.input if name in self.weights]
            if read:
                numbers = [match[1] for name in read if (match := _LAYER.search(name))]
                layer = int(numbers[0]) if numbers else None
            if node.op_type != "Constant":
                inputs, outputs = (tuple(filter(None, names)) for names in (node.input, node.output))
                nodes.append(Node(node.op_type, inputs, outputs, layer, _flops(node, kinds)))
        return Sized(
            tuple(nodes), {name: Tensor(shape, self._item(kind)) for name, (kind, shape) in kinds.items()}
        )

    def _given(self, shapes: Mapping[str, Shape]) -> tuple[dict[str, Kind], dict[str, np.ndarray]]:
        kinds: dict[str, Kind] = {}
        values: dict[str, np.ndarray] = {}
        for tensor in self._model.graph.initializer:
            kinds[tensor.name] = Kind(tensor.data_type, tuple(tensor.dims))
            if tensor.name not in self.weights and math.prod(tensor.dims) <= SMALL:
                values[tensor.name] = numpy_helper.to_array(tensor)
        for value in self._model.graph.input:
            kinds[value.name] = Kind(value.type.tensor_type.elem_type, tuple(shapes[value.name]))
        return kinds, values

    def _bytes_of(self, tensor: TensorProto) -> int:
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            return math.prod(tensor.dims) // 2
        return math.prod(tensor.dims) * self._item(tensor.data_type)

    def _item(self, kind: int) -> int:
        """Bytes of an element."""
        if self._float_bytes and kind in FLOATS:
            return self._float_bytes
        return helper.tensor_dtype_to_np_dtype(kind).itemsize


def _flops(node: NodeProto, kinds: Mapping[str, Kind]) -> int:
    if node.op_type not in ("Gemm", "MatMul", MATMUL_N_BITS, "Conv", "Attention"):
        return 0
    first, second, out = (kinds[name].shape for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Attention":  # q [1, H, R, C], k [1, G, S, C]
        return 4 * math.prod(first) * second[2]
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(second[1:])
    across = first[-1]
    if node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute):
        across = first[0]
    return 2 * math.prod(out) * across


def _read_whole(node: NodeProto) -> list[str]:
    """Inputs of which a node may read every element: all but the table of a Gather."""
    return list(node.input[1:] if node.op_type == "Gather" else node.input)


def _place(tensor: TensorProto) -> tuple[str, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries.get("offset", 0))
