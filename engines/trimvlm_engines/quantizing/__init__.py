"""Quantised weights of a part's graph, made at build time for targets whose `weights` ask for it.

The matrices of the layers and the language model head become blocks of integers with a scale each; norms,
biases, convolutions and embeddings stay as they are. ONNX Runtime gets `MatMulNBits`, TensorRT a
`DequantizeLinear` before each matrix product. Builds of a bundle that want the same matrices in the same form
share one file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from trimvlm.bundle import Bundle, Manifest
from trimvlm.target import Target, Weights
from trimvlm_engines import record

if TYPE_CHECKING:
    import onnx

    from trimvlm_engines.quantizing.store import Matrix, Store

log = logging.getLogger(__name__)

QUANTIZED = "quantized"  # in names of files, and of what an Engine says of them
SCHEME = 2  # number of the rule in `codes.quantize` and of the file's order: another makes other files
MATMUL = ("CPUExecutionProvider", "CUDAExecutionProvider")  # have a kernel for MatMulNBits


def quantize(model: onnx.ModelProto, bundle: Bundle, target: Target, weights: Weights) -> Store | None:
    """Makes a graph read quantised weights, in place; `ensure` makes their file. None: no weight can be."""
    from trimvlm_engines.quantizing.graph import quantize_graph
    from trimvlm_engines.quantizing.store import Store, matrices

    form = "matmul" if target.provider in MATMUL else "dequantize"
    found = matrices(model, weights, form)
    if not found:
        return None
    kind = f"int{weights.bits}x{weights.block}.{form}.{_digest(bundle.manifest, found)}"
    store = Store(f"{record.STORES}{kind}.safetensors", weights, form, found)
    quantize_graph(model, store)
    return store


def _digest(manifest: Manifest, found: Iterable[Matrix]) -> str:
    """Of what goes into a file, so that its name tells whether it is up to date."""
    sources = [SCHEME, *((*each, manifest.files[each.location].sha256) for each in found)]
    return hashlib.sha256(msgspec.json.encode(sources)).hexdigest()[:12]


def ensure(bundle: Bundle, store: Store) -> Bundle:
    """Makes and records the file of a store that the bundle does not have yet; returns the bundle with it."""
    directory = bundle.directory
    with record.building(directory, QUANTIZED):
        bundle = record.open_bundle(directory)
        if store.name in bundle.manifest.files:
            return bundle
        log.info("%s: quantising %d matrices", store.name, len(store.matrices))
        with record.PlanFile(directory / store.name) as file:
            store.write(file.write, directory)

        def add(manifest: Manifest) -> Manifest:
            return msgspec.structs.replace(manifest, files={**manifest.files, store.name: file.file})

        record.change_manifest(directory, add, [file])
    return Bundle(directory)
