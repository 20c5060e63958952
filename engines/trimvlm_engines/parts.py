"""What a build consists of: one graph, one plan, shape ranges; for one profile on one Target."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trimvlm.backends.providers import CPU
from trimvlm.bundle import Bundle, DecoderGraph, Entry, Manifest
from trimvlm.errors import UserError
from trimvlm.images import pixel_shape
from trimvlm.opening import on_cpu
from trimvlm.schedule import Schedule
from trimvlm.target import BLOCKS, Target, Weights
from trimvlm.value import Value
from trimvlm_engines.padding import pad
from trimvlm_engines.quantizing import quantize
from trimvlm_engines.rewriting import read_graph
from trimvlm_engines.shapes import (
    ShapeRange,
    decoder_ranges,
    features_range,
    images_range,
    router_ranges,
    split,
)
from trimvlm_engines.splitting import pieces

if TYPE_CHECKING:
    from trimvlm_engines.weight_files import WeightFile

Role = str  # `vision`, `projector`, `router`, `decoder`, or of blocks of layers `decoder.0`, ...


class Part(Value, frozen=True, kw_only=True):
    """One graph to build.

    Attributes:
        graph: file of the graph in the bundle.
        made: the graph, where the build makes it (`trimvlm_engines.splitting`).
        plan: file that the plan gets.
        ranges: shape ranges of its inputs.
        sources: hashes of everything that goes into it.
        phases: ranges of prefill and of decode, where the target wants them split.
        store: the file of weights that the graph reads and the build makes (`trimvlm_engines.weight_files`).
    """

    graph: str
    made: bytes | None = None
    plan: str
    ranges: dict[str, ShapeRange]
    sources: dict[str, Any]
    phases: tuple[dict[str, ShapeRange], ...] = ()
    store: WeightFile | None = None


def parts(bundle: Bundle, name: str, entry: Entry, target: Target) -> dict[Role, Part]:
    """What has to be built for one profile. Profiles that share a graph share its plan."""
    return parts_of(bundle, name, entry, target, lowering(entry, target))


def lowering(entry: Entry, target: Target) -> DecoderGraph:
    """The decoder that a target runs: on a CPU and in one piece, with caches that grow in place."""
    limits = target.limits
    whole = limits.layers_per_engine is None and limits.lm_head_columns is None
    return on_cpu(entry) if target.provider == CPU and target.decoder == "fused" and whole else target.decoder


def parts_of(
    bundle: Bundle, name: str, entry: Entry, target: Target, graph: DecoderGraph
) -> dict[Role, Part]:
    """The same with the decoder in a certain lowering."""
    manifest = bundle.manifest
    profile = bundle.profile(name)
    schedule = Schedule.resolve(profile, entry.model)
    decoder = entry.decoders.get(graph)
    if decoder is None:
        raise _no_decoder(bundle, entry, name, target)
    pixels = pixel_shape(manifest.image, entry.model.grid)
    images = images_range(pixels, target.limits, one=entry.model.grid is not None)
    found: dict[Role, Part] = {"vision": _seeing(bundle, entry.vision, target, {"pixel_values": images})}
    if entry.projector:
        rows = entry.tower.views * entry.tower.patches  # not the profile's fewer: the plan is shared
        features = features_range(rows, entry.tower.width, target.limits)
        found["projector"] = _seeing(bundle, entry.projector, target, {"features": features})
    if entry.router:
        stored = str(Path(entry.router).with_suffix(".safetensors"))
        found["router"] = Part(
            graph=entry.router,
            plan=f"{Path(entry.router).stem}.{target.name}.engine",
            ranges=router_ranges(entry.model, target.limits),
            sources={
                "graph": manifest.files[entry.router].sha256,
                "weights": {**_hashes(manifest), stored: manifest.files[stored].sha256},
            },
        )
    ranges = decoder_ranges(schedule, target.limits, filled=not target.empty_tensors)
    phases = split(ranges) if target.ranges == "split" else ()
    stores: list[WeightFile] = []

    def rewrite(model: Any) -> dict[str, Any]:
        store = _stored(model, bundle, target, target.weights)
        if store is None and target.weights:
            raise UserError(
                f"target {target.name}: weights.block: no matrix of this model has rows of whole blocks, "
                f"not even of {BLOCKS[-1]}; choose a target without `weights`"
            )
        stores.extend([store] if store else [])
        return store.said if store else {}

    whole = bundle.path(decoder)
    other = target.weights or target.padded
    made = pieces(whole, target.limits, ranges, phases, rewrite if other else None)
    read = _hashes(manifest, next(iter(stores), None))
    for piece in made:
        found[piece.role] = Part(
            graph=f"{name}.{target.name}.{piece.role}.onnx" if piece.graph else decoder,
            made=piece.graph,
            plan=f"{name}.{target.name}.{piece.role}.engine",
            ranges=piece.ranges,
            phases=piece.phases,
            store=stores[0] if stores else None,
            sources={
                "graph": manifest.files[decoder].sha256,
                "weights": read,
                "profile": profile.digest,
                **piece.how,
            },
        )
    if target.padded and not any(part.store for part in found.values()):
        raise UserError(
            f"target {target.name}: padded: no float32 matrix of this model has rows of whole pages (a "
            "multiple of 1,024 values); choose the target without it, which is as fast"
        )
    return found


def _seeing(bundle: Bundle, graph: str, target: Target, ranges: dict[str, ShapeRange]) -> Part:
    """The tower or the projector, which profiles share."""
    manifest, stem = bundle.manifest, Path(graph).stem
    part = Part(
        graph=graph,
        plan=f"{stem}.{target.name}.engine",
        ranges=ranges,
        sources={"graph": manifest.files[graph].sha256, "weights": _hashes(manifest)},
    )
    weights = target.weights.vision if target.weights else None
    if weights is None and not target.padded:
        return part
    model = read_graph(bundle.path(graph))
    store = _stored(model, bundle, target, weights)
    if store is None:  # a projector without matrices, or with other rows
        return part
    return msgspec.structs.replace(
        part,
        graph=f"{stem}.{target.name}.onnx",
        made=model.SerializeToString(),
        sources={**part.sources, "weights": _hashes(manifest, store), **store.said},
        store=store,
    )


def _stored(model: Any, bundle: Bundle, target: Target, weights: Weights | None) -> WeightFile | None:
    """Makes a graph read a file of the build's own, in place; None: it has no matrix for one."""
    return quantize(model, bundle, target, weights) if weights else pad(model, bundle)


def _hashes(manifest: Manifest, store: WeightFile | None = None) -> dict[str, str]:
    """Of the files of weights that a graph may read. One that is still to be made has none."""
    names = [*manifest.weights, *([store.name] if store and store.name in manifest.files else [])]
    return {name: manifest.files[name].sha256 for name in names}


def _no_decoder(bundle: Bundle, entry: Entry, name: str, target: Target) -> UserError:
    directory = bundle.directory
    if target.lowering not in entry.decoders:
        return UserError(
            f"{directory}: profile {name} has no {target.lowering} decoder, which target {target.name} "
            "takes; export it again"
        )
    manifest = bundle.manifest
    weights = "".join(manifest.files[file].sha256 for file in sorted(manifest.weights))
    linked = hashlib.sha256(weights.encode()).hexdigest() == manifest.fingerprint  # not converted
    checkpoint = directory / Path(manifest.text.tokenizer).parent if linked else "MODEL"
    profile = "FILE" if entry.router else directory / entry.profile  # with its router's weights beside it
    return UserError(
        f"{directory}: profile {name} has no {target.lowering} decoder without empty tensors, which target "
        f"{target.name} asks for; add it on the workstation with trimvlm export {checkpoint} --profile "
        f"{profile} --dtype {manifest.dtype} --out {directory} --no-empty-tensors"
    )
