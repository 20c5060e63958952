"""What an ONNX file takes, gives and reads of the weights; the weights themselves are not loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trimvlm.profile import layer_numbers
from trimvlm_tools import console

Value = dict[str, Any]


def read_graph(path: Path) -> dict[str, Any]:
    """Inputs and outputs of an ONNX file, and the bytes of other files that are its weights.

    Returns:
        `inputs` and `outputs`: of each its name, dtype and dims (a text is a symbolic size); `weights`: pairs
        of a file's name, relative to the graph's, and an offset in it, each once.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = set()
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            weights.add((entries["location"], int(entries.get("offset", 0))))
    return {
        "inputs": [_value(value) for value in graph.input],
        "outputs": [_value(value) for value in graph.output],
        "weights": sorted(weights),
    }


def _value(value: Any) -> Value:
    import onnx

    tensor = value.type.tensor_type
    dims = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in tensor.shape.dim]
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        "dims": dims,
    }


def values(dims: dict[str, Any]) -> list[Value]:
    """The same of a graph that is not written yet: names and dims; the dtype is the weights' choice."""
    return [{"name": name, "dtype": None, "dims": list(sizes)} for name, sizes in dims.items()]


def graph_table(inputs: Sequence[Value], outputs: Sequence[Value]) -> str:
    """Inputs and outputs for people; equal ones of several layers in one line (`past_key.0-11`)."""
    rows = [*_rows("in", inputs), *_rows("out", outputs)]
    return "\n".join(f"  {line}" for line in console.table(("", "name", "type"), rows).splitlines()[1:])


def _rows(direction: str, found: Iterable[Value]) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for value in found:
        numbered = re.fullmatch(r"(.+)\.(\d+)", value["name"])
        sizes = f"[{', '.join(map(str, value['dims']))}]"
        kind = sizes if value["dtype"] is None else f"{value['dtype']} {sizes}"
        numbers = groups.setdefault((numbered[1] if numbered else value["name"], kind), [])
        if numbered:
            numbers.append(int(numbered[2]))
    return [
        (direction, f"{name}.{layer_numbers(numbers)}" if numbers else name, kind)
        for (name, kind), numbers in groups.items()
    ]
