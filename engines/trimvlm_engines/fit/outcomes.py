"""What the nodes of a graph give: shapes by onnx's own rules, and the small numbers that shapes are made of.

Kept by what a node is given, since most nodes are given the same again for other sizes of the graph's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from trimvlm.errors import UserError

Shape = tuple[int, ...]
# ONNX Runtime's own, of which onnx knows no rule.
MATMUL_N_BITS, SKIP_NORM = "MatMulNBits", "SkipSimplifiedLayerNormalization"
SMALL = 64  # elements: no shape has more, and nothing larger is computed


class Kind(NamedTuple):
    """Element type (of `onnx.TensorProto`) and shape."""

    elements: int
    shape: Shape


class Outcomes:
    """Of one model, whose weights are not looked at."""

    def __init__(self, path: Path, model: ModelProto) -> None:
        self._path, self._model = path, model
        self._opsets = {opset.domain: opset.version for opset in model.opset_import}
        self._known: dict[Any, tuple[dict[str, Kind], dict[str, np.ndarray]]] = {}

    def of(
        self, number: int, kinds: Mapping[str, Kind], values: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Kind], dict[str, np.ndarray]]:
        """What the outputs of a node are, and where that is known what they hold.

        Raises:
            UserError: their sizes do not follow from what is known; names the node.
        """
        node = self._model.graph.node[number]
        names = dict.fromkeys(filter(None, node.input))
        held = {name: values[name] for name in names if name in values}
        key = (
            number,
            tuple(kinds[name] for name in names),
            tuple((name, value.tobytes()) for name, value in held.items()),
        )
        if key not in self._known:
            given = {name: kinds[name] for name in names}
            found = self._infer(node, given, held)
            self._known[key] = found, self._compute(node, given, held, found)
        return self._known[key]

    def _infer(
        self, node: NodeProto, kinds: Mapping[str, Kind], values: Mapping[str, np.ndarray]
    ) -> dict[str, Kind]:
        """Types of a node's outputs, every dimension known."""
        if node.op_type == MATMUL_N_BITS:
            rows, kind = helper.get_node_attr_value(node, "N"), kinds[node.input[0]]
            return {node.output[0]: Kind(kind.elements, (*kind.shape[:-1], rows))}
        if node.op_type == SKIP_NORM:
            return dict.fromkeys(filter(None, node.output), kinds[node.input[0]])
        schema = onnx.defs.get_schema(node.op_type, self._opsets[node.domain], node.domain)
        reason = ""
        try:
            found = shape_inference.infer_node_outputs(
                schema,
                node,
                {name: helper.make_tensor_type_proto(*kind) for name, kind in kinds.items()},
                {name: numpy_helper.from_array(value, name) for name, value in values.items()},
                opset_imports=list(self._model.opset_import),
                ir_version=self._model.ir_version,
            )
        except shape_inference.InferenceError as error:
            found, reason = {}, " ".join(str(error).split())
        for name in filter(None, node.output):
            if name not in found or not all(
                size.HasField("dim_value") for size in found[name].tensor_type.shape.dim
            ):
                raise UserError(
                    f"{self._path}: {node.op_type} {node.name}: its size does not follow from those of the "
                    f"inputs {reason}".rstrip()
                    + "; export it again"
                )
        return {
            name: Kind(
                kind.tensor_type.elem_type, tuple(size.dim_value for size in kind.tensor_type.shape.dim)
            )
            for name, kind in found.items()
        }

    def _compute(
        self,
        node: NodeProto,
        kinds: Mapping[str, Kind],
        values: Mapping[str, np.ndarray],
        found: Mapping[str, Kind],
    ) -> dict[str, np.ndarray]:
        """What a node gives, where it is small and everything that it reads is known."""
        if node.op_type == "Shape":
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            shape = np.array(kinds[node.input[0]].shape, np.int64)
            return {node.output[0]: shape[ends.get("start", 0) : ends.get("end")]}
        if len(values) < len(kinds) or any(math.prod(kind.shape) > SMALL for kind in found.values()):
            return {}
        inputs, outputs = (
            [helper.make_tensor_value_info(name, *kind) for name, kind in some.items()]
            for some in (kinds, found)
        )
        graph = helper.make_graph([node], "one", inputs, outputs)
        model = helper.make_model(graph, opset_imports=list(self._model.opset_import))
        results: Any = ReferenceEvaluator(model).run(None, dict(values))
        return {name: np.asarray(value) for name, value in zip(found, results, strict=True)}
