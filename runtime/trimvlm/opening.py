"""From a name in a bundle and a target to the backends that run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from trimvlm.backends import Backend, load_backend
from trimvlm.backends.blocks import Blocks, block_roles, part_of
from trimvlm.binding import check_engine
from trimvlm.bundle import Bundle, DecoderGraph, Engine, Entry
from trimvlm.errors import UserError
from trimvlm.machine import PLAN_LIBRARIES
from trimvlm.target import numbers

ORT_CPU = "ort-cpu"
IN_PLACE_SINCE = (1, 25)  # of ONNX Runtime: has TensorScatter on the CPU


def check_opening(bundle: Bundle, names: Iterable[str], target: str) -> None:
    """Checks all that a session of these profiles or choices will load, before any of it is loaded.

    Hashes of all small files and of the large ones that are read; what the engines are bound to.

    Raises:
        UserError: as `open_backends`, a damaged file, or an engine that does not fit.
    """
    members = [member for name in names for member in bundle.members(name)]
    chosen = {member: _graphs(bundle, member, target) for member in members}
    read = {file for _, graphs in chosen.values() for file in graphs.values()}
    graphs = any(library not in PLAN_LIBRARIES for library, _ in chosen.values())
    if graphs or any("graphs" in _of_engine(bundle, member, target) for member in members):  # map the weights
        read.update(name for name in bundle.manifest.files if name.endswith(".safetensors"))
    bundle.check(read)
    for member in members:
        engine = bundle.manifest.profiles[member].engines.get(target)
        if engine is not None:
            check_engine(bundle, member, engine)


def open_backends(
    bundle: Bundle, name: str, target: str, options: Mapping[str, Any], *, shared: bool = False
) -> dict[str, Backend]:
    """Backends by profile: of the profile `name`, or of each member of the choice `name`.

    The first runs what comes before the decoder too, the others their decoders alone. Decoders of a choice
    leave their weights in the mapped files on ONNX Runtime unless `options` says otherwise: there they share
    them, but for quantised ones, which each packs for itself. Engines of other targets have a copy each.

    Raises:
        UserError: no profile or engine of that name, members that differ in their encoder stage, a precision
            that the target does not run, or a backend that is not installed.
    """
    members = bundle.members(name)
    if len({bundle.profile(member).decisions.encoder for member in members}) > 1:
        raise UserError(
            f"{bundle.directory}: the members of {name} differ in their encoder stage; export members of one "
            "calibration"
        )
    found: dict[str, Backend] = {}
    for member in members:
        library, graphs = _graphs(bundle, member, target)
        roles = [role for role in graphs if not found or part_of(role) == "decoder"]
        mapped = {"low_memory": True} if (shared or len(members) > 1) and library == "onnxruntime" else {}
        files = {role: bundle.path(graphs[role]) for role in roles}
        given = {**mapped, **_of_engine(bundle, member, target), **options}
        backend, blocks = load_backend(library, files, given), block_roles(roles)
        found[member] = Blocks(backend, blocks) if blocks else backend
    return found


def on_cpu(entry: Entry) -> DecoderGraph:
    """The decoder graph for ONNX Runtime on a CPU: where its version can, with caches that grow in place."""
    try:
        can = numbers(version("onnxruntime")) >= IN_PLACE_SINCE
    except PackageNotFoundError:  # a build of another name
        can = False
    return "in_place" if can and "in_place" in entry.decoders else "fused"


def _of_engine(bundle: Bundle, name: str, target: str) -> dict[str, Any]:
    """Options of the backend that follow from what a profile was built for, and how."""
    engine = bundle.manifest.profiles[name].engines.get(target)
    if engine is None:
        return {}
    if engine.backend not in PLAN_LIBRARIES:
        providers = [options["provider"] for options in engine.options.values() if "provider" in options]
        packed = [role for role, options in engine.options.items() if "quantized" in options]
        return {**({"provider": providers[0]} if providers else {}), **({"packed": packed} if packed else {})}
    names = {file.sha256: each for each, file in bundle.manifest.files.items() if each.endswith(".onnx")}
    graphs = {
        role: bundle.path(options.get("piece") or names[options["graph"]])
        for role, options in engine.options.items()
        if options.get("stripped")
    }
    compatible = any(options.get("version_compatible") for options in engine.options.values())
    return {
        **({"graphs": graphs} if graphs else {}),
        **({"version_compatible": True} if compatible else {}),
    }


def _graphs(bundle: Bundle, name: str, target: str) -> tuple[str, dict[str, str]]:
    """Backend and files by role that run a profile on a target."""
    entry = bundle.manifest.profiles[name]
    engine: Engine | None = entry.engines.get(target)
    if target == ORT_CPU and bundle.manifest.dtype == "bfloat16":
        raise UserError(
            f"{bundle.directory}: the weights are bfloat16, which ONNX Runtime does not compute on a CPU; "
            "export with --dtype float32 or float16, or open it for a target that runs bfloat16 "
            "(trimvlm targets)"
        )
    if engine is None and target == ORT_CPU:
        some = {"projector": entry.projector, "router": entry.router}
        others = {role: file for role, file in some.items() if file}
        return "onnxruntime", {"vision": entry.vision, **others, "decoder": entry.decoders[on_cpu(entry)]}
    if engine is None:
        built = ", ".join(sorted({ORT_CPU, *entry.engines}))
        raise UserError(
            f"{bundle.directory}: profile {name} has no engine for target {target!r}, only for {built}; "
            f"make one with trimvlm build {bundle.directory} --target {target}"
        )
    return engine.backend, engine.graphs
