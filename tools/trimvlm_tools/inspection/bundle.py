"""A bundle: what its profiles run, which tensors of the checkpoint that needs, and its files and engines."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import TYPE_CHECKING, Any

from trimvlm_tools import console
from trimvlm_tools.inspection.graphs import graph_table, read_graph

if TYPE_CHECKING:
    from trimvlm.bundle import Bundle, Entry


def describe_graphs(bundle: Bundle, name: str) -> list[dict[str, Any]] | None:
    """Graphs of the profile `name`: role, file, inputs, outputs, number and bytes of the weights.

    None on a machine without onnx, which runs bundles but cannot read graphs.
    """
    if importlib.util.find_spec("onnx") is None:
        return None
    stored = _stored(bundle)
    graphs = []
    for role, file in _files(bundle.manifest.profiles[name]):
        graph = read_graph(bundle.path(file))
        used = [stored[place][1] for place in graph.pop("weights") if place in stored]
        graphs.append({"role": role, "file": file, **graph, "tensors": len(used), "weight_bytes": sum(used)})
    return graphs


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """The whole bundle, as plain data."""
    import msgspec

    manifest, consumed = bundle.manifest, _consumed(bundle)
    named = {*(consumed or ()), *manifest.ignored_tensors}
    folded = [name for name, _ in sorted(_stored(bundle).values()) if name not in named]
    return {
        "path": str(bundle.directory),
        "format": manifest.format,
        "producer": manifest.producer,
        "dtype": manifest.dtype,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "weight_bytes": sum(manifest.files[name].bytes for name in manifest.weights),
        "files": {name: file.bytes for name, file in sorted(manifest.files.items())},
        "consumed_tensors": consumed,
        "folded_tensors": None if consumed is None else folded,
        "ignored_tensors": manifest.ignored_tensors,
        "image": msgspec.to_builtins(manifest.image),
        "engines": [
            {"profile": name, **msgspec.to_builtins(engine)}
            for name, entry in sorted(manifest.profiles.items())
            for engine in entry.engines.values()
        ],
    }


def _files(entry: Entry) -> list[tuple[str, str]]:
    """Roles and graphs of a profile in the order in which they run."""
    found = [("vision", entry.vision), ("projector", entry.projector), ("router", entry.router)]
    # Those that take and give the same next to one another.
    decoders = sorted(entry.decoders.items(), key=lambda item: (item[0] == "in_place", item))
    found += [(f"decoder, {lowering}", file) for lowering, file in decoders]
    return [(role, file) for role, file in found if file]


def _stored(bundle: Bundle) -> dict[tuple[str, int], tuple[str, int]]:
    """Tensors of the checkpoint in the bundle: file and offset to name and bytes."""
    from trimvlm_export.checkpoint import read_header

    return {
        (name, tensor.offset): (tensor.name, tensor.length)
        for name in bundle.manifest.weights
        for tensor in read_header(bundle.path(name))
    }


def _consumed(bundle: Bundle) -> dict[str, int] | None:
    """Names and bytes of the checkpoint's tensors that a graph reads; None as `describe_graphs`."""
    if importlib.util.find_spec("onnx") is None:
        return None
    stored = _stored(bundle)
    graphs = {file for entry in bundle.manifest.profiles.values() for _, file in _files(entry)}
    places = {place for file in graphs for place in read_graph(bundle.path(file))["weights"]}
    return dict(sorted(stored[place] for place in places if place in stored))


def graphs_text(graphs: list[dict[str, Any]] | None) -> str:
    """A profile's graphs for people; those of one role that take and give the same together."""
    if graphs is None:
        return "graphs: not read, since onnx is not installed; pip install 'trimvlm[export]'"
    lines: list[str] = []
    for graph in graphs:
        table = graph_table(graph["inputs"], graph["outputs"])
        if lines and lines[-1] == table:
            lines.pop()
        read = f"{graph['tensors']} tensors, {graph['weight_bytes']:,} bytes of weights"
        lines += [f"{graph['role']}: {graph['file']}, {read}", table]
    return "\n".join(lines)


def bundle_text(report: dict[str, Any]) -> str:
    """The whole bundle for people."""
    consumed, ignored = report["consumed_tensors"], report["ignored_tensors"]
    lines = [
        f"bundle {report['path']}: format {report['format']}, {report['dtype']}, {report['bytes']:,} bytes, "
        f"by {report['producer']}",
        console.table(("file", "bytes"), list(report["files"].items())),
        f"weights, once for all profiles: {report['weight_bytes']:,} bytes",
    ]
    if consumed is not None:
        lines.append(f"checkpoint tensors in graphs: {len(consumed)}, {sum(consumed.values()):,} bytes")
    if report["folded_tensors"]:
        lines.append(f"folded into constants of graphs: {', '.join(report['folded_tensors'])}")
    lines += [f"checkpoint tensors that no graph uses: {len(ignored)}", *reasons(ignored)]
    rows = [
        [
            *(engine[name] for name in ("profile", "target", "backend", "version")),
            ", ".join(engine["graphs"].values()),
        ]
        for engine in report["engines"]
    ]
    if rows:
        lines += ["", console.table(("profile", "target", "backend", "version", "runs"), rows)]
    else:
        lines.append("engines: none built; ort-cpu runs the graphs themselves")
    return "\n".join(lines)


def reasons(ignored: dict[str, str]) -> list[str]:
    """How many tensors are ignored for which reason, most first."""
    return [f"  {count:>3}  {reason}" for reason, count in Counter(ignored.values()).most_common()]
