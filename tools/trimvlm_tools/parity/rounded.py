"""A bfloat16 bundle as ONNX Runtime's CPU provider can run it, which has next to no operators in bfloat16."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from trimvlm.bundle import Bundle, record, write_manifest


@contextmanager
def runnable(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle itself, or for a bfloat16 one a float32 copy that rounds after every operator
    (`passes/rounded.py`). The copy lies beside it, with the same weights, while it is needed."""
    if bundle.manifest.dtype != "bfloat16":
        yield bundle
        return
    with tempfile.TemporaryDirectory(dir=bundle.directory.parent, prefix=".rounded.") as scratch:
        yield round_graphs(bundle, Path(scratch))


def round_graphs(bundle: Bundle, out: Path) -> Bundle:
    """Writes a bundle of half precision to `out` as a float32 one that rounds after every operator.

    Without decoders whose caches grow in place: those have branches, which `to_rounded` leaves as they are.
    """
    import onnx
    import onnx_ir

    from trimvlm_export.passes.rounded import to_rounded
    from trimvlm_export.weights import link

    manifest = bundle.manifest
    grown = {entry.decoders.get("in_place") for entry in manifest.profiles.values()}
    files = {name: file for name, file in manifest.files.items() if name not in grown}
    profiles = {
        name: msgspec.structs.replace(
            entry, decoders={kind: file for kind, file in entry.decoders.items() if file not in grown}
        )
        for name, entry in manifest.profiles.items()
    }
    for name in list(files):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".onnx"):
            link(bundle.path(name), out / name)
            continue
        graph = onnx.load(bundle.path(name), load_external_data=False)
        rounded = to_rounded(onnx_ir.from_proto(onnx.shape_inference.infer_shapes(graph)))
        (out / name).write_bytes(onnx_ir.to_proto(rounded).SerializeToString())
        files[name] = record(out / name)
    rounded_too = msgspec.structs.replace(manifest, dtype="float32", files=files, profiles=profiles)
    write_manifest(out, rounded_too)
    return Bundle(out)
