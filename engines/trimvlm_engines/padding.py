"""Matrices with rows a cache line longer, for ONNX Runtime's float32 products on a CPU.

Its kernel for AVX-512 reads twelve rows of the left matrix at once, as they lie. Where a row is a whole
number of pages (4 KiB), the same column of all twelve belongs to one set of a first-level cache of 32 KiB,
which holds eight lines: reads then miss it. So such rows get 64 bytes of zeros, by a Pad before the
product, and so do the matrix's, in a file that the build writes. Decision 0034 has the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimvlm.bundle import Bundle
from trimvlm_engines.weight_files import Place, digest, external, layout

if TYPE_CHECKING:
    import onnx

    from trimvlm_engines.matrices import Matrix

PAGE, LINE = 4096, 64  # bytes
COLUMNS = LINE // 4  # of zeros
SCHEME = 1  # number of the rule: another makes other files
_SIZES = "padding.sizes"


class Padded:
    """A file of matrices with longer rows (safetensors), made or to be made; see `WeightFile`."""

    def __init__(self, name: str, matrices: tuple[Matrix, ...]) -> None:
        self.name, self.matrices = name, matrices

    @property
    def said(self) -> dict[str, Any]:
        """What an Engine's options say of it."""
        return {"padded": {"columns": COLUMNS, "file": self.name}}

    @cached_property
    def _header(self) -> tuple[bytes, dict[str, Place]]:
        shapes = [(each, (each.rows, each.width + COLUMNS)) for each in self.matrices]
        return layout((each.name, "F32", shape, 4 * shape[0] * shape[1]) for each, shape in shapes)

    def place(self, name: str) -> Place:
        """Of a matrix."""
        return self._header[1][name]

    def write(self, put: Callable[[bytes | memoryview], int], directory: Path) -> None:
        """Copies the matrices of the bundle in `directory` row by row, a part at a time."""
        put(self._header[0])
        for each in self.matrices:
            for part in each.parts(directory):
                put(np.pad(part, ((0, 0), (0, COLUMNS))).tobytes())


def pad(model: onnx.ModelProto, bundle: Bundle) -> Padded | None:
    """Makes the products with matrices of whole pages read longer rows, in place; `weight_files.ensure` makes
    their file. None: there is no such matrix."""
    from onnx import NodeProto, TensorProto, helper, numpy_helper

    from trimvlm_engines.matrices import gemm_weights
    from trimvlm_engines.rewriting import replace_nodes

    whole = (each for each in gemm_weights(model) if each.kind == TensorProto.FLOAT)
    found = {each.name: each for each in sorted(whole, key=lambda m: m.name) if 4 * each.width % PAGE == 0}
    if not found:
        return None
    matrices = tuple(found.values())
    store = Padded(f"weights.padded.{digest(bundle.manifest, SCHEME, matrices)}.safetensors", matrices)
    graph, nodes, longer = model.graph, [], set[str]()
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 0, COLUMNS], np.int64), _SIZES))
    for each in matrices:
        shape = (each.rows, each.width + COLUMNS)
        graph.initializer.append(
            external(store.name, store.place(each.name), f"{each.name}.padded", each.kind, shape)
        )
    for node in graph.node:
        if node.op_type != "Gemm" or node.input[1] not in found:
            nodes.append(node)
            continue
        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert options.get("transB") and not options.get("transA"), node.name
        rows = f"{node.input[0]}.padded"
        if rows not in longer:  # of several products that read the same
            longer.add(rows)
            nodes.append(helper.make_node("Pad", [node.input[0], _SIZES], [rows], name=rows))
        made = NodeProto()
        made.CopyFrom(node)
        made.input[0], made.input[1] = rows, f"{node.input[1]}.padded"
        nodes.append(made)
    replace_nodes(graph, nodes)
    return store
