"""From a torch module to an ONNX file of kilobytes whose weights point into the bundle's safetensors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from trimvlm.bundle import write_whole
from trimvlm_export.checkpoint import Tensor

MADE_OF = "trimvlm.tensors"  # property of a graph: transformers' names of the tensors that went into it
INLINE_LIMIT = 1 << 20  # bytes of constants that may live in the graph file itself

# Operators of decoders that the exporter translates as `torch.export` gives them, but for `to` and `reshape`,
# which it wants by the names of what they do: a program of these alone needs no decomposition.
_ATEN = torch.ops.aten
_NAMES = (
    *("_assert_tensor_metadata.default", "add.Tensor", "arange.default", "arange.start", "cat.default"),
    *("cos.default", "embedding.default", "empty.memory_format", "eq.Scalar", "ge.Tensor", "linear.default"),
    *("index_select.default", "lt.Scalar", "lt.Tensor", "matmul.default", "mean.dim", "mul.Tensor"),
    *("ones.default", "repeat_interleave.self_int", "reshape.default", "rms_norm.default", "select.int"),
    *("scaled_dot_product_attention.default", "silu.default", "sin.default", "slice.Tensor", "softmax.int"),
    *("sub.Tensor", "sum.dim_IntList", "sym_size.int", "to.dtype", "topk.default", "transpose.int"),
    *("unsqueeze.default", "where.self"),
)
PLAIN = {f"aten.{name}" for name in _NAMES} | {"onnx.RotaryEmbedding.opset23"}


def trace(
    module: nn.Module,
    example: dict[str, Any],
    dynamic: Callable[[str, int], bool],
    *,
    inputs: Mapping[str, Sequence[str | int]],
    outputs: Mapping[str, Sequence[str | int] | None],
    opset: int,
) -> ir.Model:
    """Traces `module(**example)`.

    Args:
        example: keyword arguments; lists of tensors count as inputs in their order.
        dynamic: (argument name, dimension) -> whether that dimension varies.
        inputs, outputs: names in graph order with their dimensions (a text is a symbolic
            size; None: as traced).
        opset: ONNX operator set.
    """
    shapes = {
        name: [_dynamic(name, t, dynamic) for t in value]
        if isinstance(value, list)
        else _dynamic(name, value, dynamic)
        for name, value in example.items()
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.export.export(module.eval(), (), kwargs=example, dynamic_shapes=shapes, strict=False)
        _spare_decompositions(program)
        exported = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=True, verbose=False)
    assert exported is not None
    model = exported.model
    for values, named in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        assert len(values) == len(named), (len(values), list(named))
        for value, (name, dims) in zip(values, named.items(), strict=True):
            value.name = name
            if dims is not None:
                value.shape = ir.Shape(dims)
    return model


def _spare_decompositions(program: torch.export.ExportedProgram) -> None:
    """Makes a program of plain operators say that it is its own decomposition: `torch.onnx.export` decomposes
    whatever it is given, which runs it three times more."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names = {str(node.target) for node in nodes if node.target.__module__ != "_operator"}  # sizes' arithmetic
    reshapes = [node for node in nodes if node.target is _ATEN.reshape.default]
    if not names <= PLAIN or not all(_is_view(node) for node in reshapes):
        return
    for node in reshapes:
        node.target = _ATEN.view.default
    for node in nodes:
        if node.target is _ATEN.to.dtype:
            node.target, node.kwargs = _ATEN._to_copy.default, {"dtype": node.args[1]}
            node.args = node.args[:1]
    program.run_decompositions = lambda *_, **__: program  # type: ignore[method-assign]


def _is_view(reshape: torch.fx.Node) -> bool:
    """Whether a reshape needs no copy; else it is none of `view`'s."""
    (source,) = reshape.all_input_nodes[:1]
    try:
        source.meta["val"].view(reshape.meta["val"].shape)
    except (RuntimeError, ValueError):
        return False
    return True


def _dynamic(name: str, tensor: torch.Tensor, dynamic: Callable[[str, int], bool]) -> dict[int, Any]:
    return {n: torch.export.Dim.DYNAMIC for n in range(tensor.dim()) if dynamic(name, n)}


def attach_weights(model: ir.Model, weights: Mapping[str, Tensor], directory: Path) -> None:
    """Makes initialisers external: each points to the bytes of its tensor under `directory`.

    Args:
        weights: initialiser name (module parameter name) to where its bytes are.
    """
    inline = 0
    for name, value in list(model.graph.initializers.items()):
        tensor = weights.get(name)
        if tensor is None:
            assert value.const_value is not None
            inline += value.const_value.nbytes
            continue
        assert value.const_value is not None and tuple(value.const_value.shape.numpy()) == tensor.shape, name
        value.const_value = ir.ExternalTensor(
            location=tensor.file.relative_to(directory).as_posix(),
            offset=tensor.offset,
            length=tensor.length,
            dtype=value.const_value.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=directory,
        )
    assert inline < INLINE_LIMIT, f"{inline} bytes of weights were copied into the graph"


def save(model: ir.Model, path: Path, *, properties: Mapping[str, str] | None = None) -> None:
    """Writes the graph with its own properties, and without the exporter's notes (source lines of the machine
    that traced it)."""
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(properties or {})
    model.graph.metadata_props.clear()
    write_whole(path, ir.serde.serialize_model(model).SerializeToString())


def made_of(path: Path) -> set[str]:
    """What a graph's property of that name says; empty where there is no such graph."""
    if not path.exists():
        return set()
    return set(ir.load(path).metadata_props.get(MADE_OF, "").split())
