"""A decoder graph that reads quantised weights, in the form that its library has kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import NodeProto, TensorProto, helper

from trimvlm_engines.quantizing.neighbours import CONTRIB, PRODUCT, add_in_norms, merge_products
from trimvlm_engines.quantizing.store import Blocked, Store
from trimvlm_engines.rewriting import replace_nodes
from trimvlm_engines.weight_files import external

OPSET = 21  # the first with DequantizeLinear of blocks
IR_VERSION = 10  # the first with 4-bit integers


def quantize_graph(model: onnx.ModelProto, store: Store) -> None:
    """Makes the Gemms of a store's matrices read its file, in place.

    In the form `matmul` they become ONNX Runtime's MatMulNBits, which never makes the weights again; in the
    form `dequantize` they get the standard's DequantizeLinear before them, which TensorRT takes into its
    kernel. Both read weights row by row, as they lie in the checkpoint.
    """
    graph = model.graph
    merged = merge_products(graph, store) if store.form == "matmul" else []
    found = {each.name: each for each in (*store.matrices, *merged)}
    nodes: list[NodeProto] = []
    seen: set[str] = set()
    for node in graph.node:
        matrix = found.get(node.input[1]) if node.op_type == "Gemm" else None
        if matrix is None:
            nodes.append(node)
            continue
        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert options.get("transB") and not options.get("transA"), node.name
        assert options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0, node.name
        if matrix.name not in seen:
            seen.add(matrix.name)
            graph.initializer.extend(_tensors(matrix, store))
            nodes += [_dequantize(matrix)] if store.form == "dequantize" else []
        nodes += [_gemm(node, matrix)] if store.form == "dequantize" else _matmul(node, matrix, store)
    replace_nodes(graph, nodes)
    if store.form == "matmul":
        add_in_norms(graph)
        if CONTRIB not in {each.domain for each in model.opset_import}:
            model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    else:
        (standard,) = (each for each in model.opset_import if each.domain == "")
        standard.version = max(standard.version, OPSET)
        model.ir_version = max(model.ir_version, IR_VERSION)


def _tensors(matrix: Blocked, store: Store) -> list[TensorProto]:
    """Codes and scales as the store's operator takes them."""
    rows, bits, blocks = matrix.rows, store.weights.bits, matrix.blocks
    if store.form == "matmul":
        codes, kind = (rows, blocks, matrix.block * bits // 8), TensorProto.UINT8
        scales: Sequence[int] = (rows * blocks,)
    else:
        codes, kind = (rows, matrix.width), TensorProto.INT4 if bits == 4 else TensorProto.INT8
        scales = (rows, blocks)
    return [
        external(store.name, store.place(name), name, dtype, shape)
        for name, dtype, shape in (
            (f"{matrix.name}.codes", kind, codes),
            (f"{matrix.name}.scales", matrix.kind, scales),
        )
    ]


def _matmul(node: NodeProto, matrix: Blocked, store: Store) -> list[NodeProto]:
    (result,), biased = node.output, len(node.input) > 2
    product = f"{result}.product" if biased else result
    made = helper.make_node(
        PRODUCT,
        [node.input[0], f"{matrix.name}.codes", f"{matrix.name}.scales"],
        [product],
        name=product,
        domain=CONTRIB,
        K=matrix.width,
        N=matrix.rows,
        bits=store.weights.bits,
        block_size=matrix.block,
        accuracy_level=4 if store.weights.activations == "int8" else 1,
    )
    add = helper.make_node("Add", [product, node.input[2]], [result], name=result) if biased else None
    return [made, add] if add else [made]


def _dequantize(matrix: Blocked) -> NodeProto:
    made = f"{matrix.name}.values"
    inputs = [f"{matrix.name}.codes", f"{matrix.name}.scales"]
    return helper.make_node("DequantizeLinear", inputs, [made], name=made, axis=1, block_size=matrix.block)


def _gemm(node: NodeProto, matrix: Blocked) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    made.input[1] = f"{matrix.name}.values"
    return made
