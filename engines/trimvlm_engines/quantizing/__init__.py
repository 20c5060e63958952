"""Quantised weights of a part's graph, made at build time for targets whose `weights` ask for it.

The matrices of the layers and the language model head become blocks of integers with a scale each; norms,
biases, convolutions and embeddings stay as they are. ONNX Runtime gets `MatMulNBits`, TensorRT a
`DequantizeLinear` before each matrix product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimvlm.bundle import Bundle
from trimvlm.target import Target, Weights
from trimvlm_engines.weight_files import digest

if TYPE_CHECKING:
    import onnx

    from trimvlm_engines.quantizing.store import Store

SCHEME = 2  # number of the rule in `codes.quantize` and of the file's order: another makes other files
MATMUL = ("CPUExecutionProvider", "CUDAExecutionProvider")  # have a kernel for MatMulNBits


def quantize(model: onnx.ModelProto, bundle: Bundle, target: Target, weights: Weights) -> Store | None:
    """Makes a graph read quantised weights, in place; `weight_files.ensure` makes their file. None: no weight
    can be."""
    from trimvlm_engines.quantizing.graph import quantize_graph
    from trimvlm_engines.quantizing.store import Store, blocked_matrices

    form = "matmul" if target.provider in MATMUL else "dequantize"
    found = blocked_matrices(model, weights, form)
    if not found:
        return None
    kind = f"int{weights.bits}x{weights.block}.{form}.{digest(bundle.manifest, SCHEME, found)}"
    store = Store(f"weights.quantized.{kind}.safetensors", weights, form, found)
    quantize_graph(model, store)
    return store
