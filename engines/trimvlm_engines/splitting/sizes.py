"""Sizes of a graph's values at given sizes of its inputs, by ONNX shape inference.

The inference knows every operator but not all arithmetic that makes shapes (`8 * (rows / 16)`), so that is
computed and the values are put in its place; again, until nothing new is known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

SMALL = 64  # elements of what can be a shape, or a part of one


class Kind(NamedTuple):
    """Element type (of `onnx.TensorProto`) and shape of a value."""

    dtype: int
    shape: tuple[int, ...]


def sizes_at(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, Kind]:
    """Every value that inference can tell, at these shapes of the graph's inputs. No weight is read."""
    known = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if not tensor.external_data and math.prod(tensor.dims) <= SMALL
    }
    fixed = _fixed(model, inputs)
    while True:
        inferred = shape_inference.infer_shapes(fixed, data_prop=True).graph
        kinds = {
            value.name: _kind(value) for value in [*inferred.input, *inferred.value_info, *inferred.output]
        }
        found = {name: kind for name, kind in kinds.items() if kind is not None}
        news = _computed(fixed, found, known)
        if not news:
            return found | {
                name: Kind(helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in known.items()
            }
        known |= news
        nodes = [node for node in fixed.graph.node if node.output[0] not in news]
        del fixed.graph.node[:]
        fixed.graph.node.extend(nodes)
        fixed.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in news.items())


def _fixed(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
    """A copy with these input shapes and no others."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        value.CopyFrom(
            helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, inputs[value.name])
        )
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    return fixed


def _kind(value: onnx.ValueInfoProto) -> Kind | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
        return None
    return Kind(kind.elem_type, tuple(dim.dim_value for dim in kind.shape.dim))


def _computed(
    model: onnx.ModelProto, kinds: Mapping[str, Kind], known: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """What nodes give whose inputs are all known: shapes, and small arithmetic with them."""
    found: dict[str, NDArray[Any]] = {}
    nodes, made, given = [], set(known), {}
    outputs_of_graph = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if outputs_of_graph & set(node.output) or len(node.output) != 1:
            continue
        (name,) = node.output
        if node.op_type == "Shape":
            if node.input[0] in kinds:
                part = {each.name: each.i for each in node.attribute}
                shape = kinds[node.input[0]].shape[part.get("start", 0) : part.get("end")]
                found[name] = given[name] = np.array(shape, np.int64)
            continue
        inputs = [each for each in node.input if each]
        small = name in kinds and math.prod(kinds[name].shape) <= SMALL
        if small and all(each in made or each in given for each in inputs):
            nodes.append(node)
            made.add(name)
            given.update((each, known[each]) for each in inputs if each in known)
    if not nodes:
        return found
    values = [
        helper.make_tensor_value_info(each, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for each, a in given.items()
    ]
    outputs = [node.output[0] for node in nodes]
    results = [helper.make_tensor_value_info(each, kinds[each].dtype, None) for each in outputs]
    graph = helper.make_graph(nodes, "shapes", values, results)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    computed = ReferenceEvaluator(alone).run(None, given)
    return found | {name: np.asarray(value) for name, value in zip(outputs, computed, strict=True)}
