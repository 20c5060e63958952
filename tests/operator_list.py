"""What the parser of TensorRT 10.3 would refuse of a graph, by its list of operators: `refused(path)`.

The list and where each of its facts comes from: `tests/data/tensorrt_10.3_operators.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper, shape_inference

LIST = json.loads(Path(__file__).with_name("data").joinpath("tensorrt_10.3_operators.json").read_text())


def types_of(operator: str) -> set[str]:
    """Element types of data that the operator takes for certain."""
    found = LIST["operators"][operator]
    return set(found["before"]) & set(found["after"])


def refused(path: Path) -> list[str]:
    """Everything in a graph that is not on the list, in words."""
    model = shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False), strict_mode=True)
    return sorted(set(_opsets(model)) | set(_nodes(model.graph)))


def _opsets(model: onnx.ModelProto) -> Iterator[str]:
    low, high = LIST["opset"]
    for imported in model.opset_import:
        if imported.domain or not low <= imported.version <= high:
            yield f"opset {imported.domain or 'ai.onnx'} {imported.version}"


def _nodes(graph: onnx.GraphProto) -> Iterator[str]:
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    known = {tensor.name for tensor in graph.initializer}
    known |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    for value in values:
        if len(value.type.tensor_type.shape.dim) > LIST["largest_rank"]:
            yield f"{value.name}: rank {len(value.type.tensor_type.shape.dim)}"
    for node in graph.node:
        if node.domain or node.op_type not in LIST["operators"]:
            yield f"operator {node.domain}{node.op_type}"
            continue
        yield from _attributes(node)
        for number, name in enumerate(node.input):
            if name and number in LIST["constant_inputs"].get(node.op_type, ()) and name not in known:
                yield f"{node.op_type}: input {number} is computed"
            kind = TensorProto.DataType.Name(types.get(name, 0)) if name else ""
            wanted = types_of(node.op_type)
            if number in LIST["integer_inputs"].get(node.op_type, ()):
                wanted = {"INT64"}
            if name and kind not in wanted:
                yield f"{node.op_type}: input {number} of {kind}"


def _attributes(node: onnx.NodeProto) -> Iterator[str]:
    only = LIST["attributes"].get(node.op_type, {})
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            yield f"{node.op_type}: has a graph inside"
            continue
        value: Any = helper.get_attribute_value(attribute)
        value = value.decode() if isinstance(value, bytes) else value
        if attribute.name in only and value != only[attribute.name]:
            yield f"{node.op_type}: {attribute.name} is {value}"
        if node.op_type == "Cast" and TensorProto.DataType.Name(value) not in types_of("Cast"):
            yield f"Cast: to {TensorProto.DataType.Name(value)}"
    if node.op_type in LIST["one_output"] and len([name for name in node.output if name]) > 1:
        yield f"{node.op_type}: more than one output"
