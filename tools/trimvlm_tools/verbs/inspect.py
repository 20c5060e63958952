"""Show what a profile does and costs: its schedule, budgets, FLOPs and KV cache; of a bundle also its files
and engines. Everything shown follows from the schedule; nothing is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm.rules import reads, rule_name
from trimvlm_tools import console

if TYPE_CHECKING:
    from trimvlm.bundle import Bundle
    from trimvlm.profile import Profile
    from trimvlm.schedule import Row, Schedule

BYTES = {"float16": 2, "float32": 4}
CONVENTIONS = {
    "macv": "visual rows only, one multiply-accumulate = 1, three FFN matrices",
    "mac2": "all rows, 2 per multiply-accumulate, three FFN matrices, no causal halving, no LM head",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm inspect`."""
    parser.add_argument("path", type=Path, help="a bundle or a profile (YAML)")
    parser.add_argument("--profile", help="one profile of a bundle; all of them when left out")
    parser.add_argument("--model", type=Path, help="also check that the profile fits this checkpoint")
    parser.add_argument("--text", type=int, default=32, help="text rows t that costs are counted with (32)")
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Reports on a bundle or a profile."""
    if args.text < 1:
        raise UserError(f"--text: {args.text} is not a positive number of rows")
    bundle = None
    if args.path.is_dir():
        from trimvlm.bundle import Bundle

        bundle = Bundle(args.path)
        names = [bundle.entry(args.profile)[0]] if args.profile else sorted(bundle.manifest.profiles)
        profiles = [bundle.profile(name) for name in names]
        dtype = bundle.manifest.dtype
    else:
        from trimvlm_calib import files

        if args.profile:
            raise UserError(f"--profile: {args.path} is a single profile, not a bundle")
        profiles, dtype = [files.load_profile(args.path)], "float16"
    if args.model:
        from trimvlm.profile import check_fits
        from trimvlm_export.checkpoint import model_spec

        for profile in profiles:
            check_fits(profile, model_spec(args.model))
    report: dict[str, Any] = {"profiles": [describe(profile, args.text, dtype) for profile in profiles]}
    if bundle:
        report["bundle"] = describe_bundle(bundle)
    if args.json:
        console.emit(report)
        return 0
    parts = [profile_text(profile) for profile in report["profiles"]]
    if bundle:
        parts.append(bundle_text(report["bundle"]))
    print("\n\n".join(parts))
    return 0


def describe(profile: Profile, text: int, dtype: str) -> dict[str, Any]:
    """What a profile does and costs, as plain data: one image, `text` text rows, KV in `dtype`."""
    import msgspec

    from trimvlm.accounting import kv_bytes_per_layer, mac2, macv, router_flops, selection_flops
    from trimvlm.profile import Decisions
    from trimvlm.schedule import Schedule, resolve

    schedule, dense = Schedule.resolve(profile, profile.model), resolve(Decisions(), profile.model)
    kv_bytes = kv_bytes_per_layer(schedule, text, BYTES[dtype])
    return {
        "name": profile.name,
        "digest": profile.digest,
        "method": msgspec.to_builtins(profile.method),
        "model": msgspec.to_builtins(profile.model),
        "calibration": msgspec.to_builtins(profile.calibration),
        "needs_adapted_weights": profile.needs_adapted_weights,
        "positions": schedule.positions,
        "mask": schedule.mask,
        "layers": [
            {**_layer(schedule, row), "kv_bytes": size}
            for row, size in zip(schedule.rows, kv_bytes, strict=True)
        ],
        "mean_visual_tokens": schedule.mean_visual_tokens,
        "flops": {
            "n": profile.model.visual_tokens,
            "t": text,
            "macv": macv(schedule),
            "macv_of_dense": macv(schedule) / macv(dense),
            "mac2": mac2(schedule, text),
            "mac2_of_dense": mac2(schedule, text) / mac2(dense, text),
            "selection_mac2": selection_flops(schedule, text) + router_flops(profile.router, schedule, text),
            "conventions": CONVENTIONS,
        },
        "kv": {
            "dtype": dtype,
            "bytes": sum(kv_bytes),
            "bytes_dense": sum(kv_bytes_per_layer(dense, text, BYTES[dtype])),
        },
    }


def _layer(schedule: Schedule, row: Row) -> dict[str, Any]:
    """One row of the table: how many visual rows take part in what."""
    executed = row.attends and row.execute == "both"
    select = None
    if row.select:
        rule = f"{rule_name(row.select.by)} ({reads(row.select.by)})"
        select = {"from": schedule.live_before(row.layer), "keep": row.select.keep, "by": rule}
    return {
        "layer": row.layer,
        "select": select,
        "live": row.live,
        "query": row.queries,
        "text_keys": row.live if executed and row.text_keys != "none" else 0,
        "visual_keys": row.live if executed and row.queries and row.visual_keys == "live" else 0,
        "ffn": row.ffn_rows,
        "cache": row.cached,
        "execute": row.execute,
    }


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Files and engines of a bundle, as plain data."""
    import msgspec

    manifest = bundle.manifest
    return {
        "path": str(bundle.directory),
        "format": manifest.format,
        "producer": manifest.producer,
        "dtype": manifest.dtype,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "files": {name: file.bytes for name, file in sorted(manifest.files.items())},
        "ignored_tensors": manifest.ignored_tensors,
        "engines": [
            {"profile": name, **msgspec.to_builtins(engine)}
            for name, entry in sorted(manifest.profiles.items())
            for engine in entry.engines.values()
        ],
    }


def profile_text(report: dict[str, Any]) -> str:
    """The same for people."""
    from trimvlm.profile import layer_numbers

    model, flops, kv = report["model"], report["flops"], report["kv"]
    lines = [
        f"profile {report['name']}: method {report['method']['name']}"
        + "".join(f", {setting}" for setting in _settings(report["method"]["parameters"])),
        f"model: {model['family']}, {model['layers']} layers, width {model['hidden']}, FFN {model['ffn']}, "
        f"{model['heads']}/{model['kv_heads']} heads of {model['head_dim']}, "
        f"{model['visual_tokens']} visual tokens per image",
    ]
    if found := report["calibration"]:
        lines.append(f"calibrated on {found['data']}: {found['samples']} samples, seed {found['seed']}")
    if report["needs_adapted_weights"]:
        lines.append("needs adapted weights: on the plain checkpoint expect a loss of accuracy")
    header = ("layer", "live", "query", "text keys", "visual keys", "FFN", "cache", "KV bytes", "")
    columns = ("layer", "live", "query", "text_keys", "visual_keys", "ffn", "cache", "kv_bytes")
    rows = [[layer[column] for column in columns] + [_remark(layer)] for layer in report["layers"]]
    skipped = [layer["layer"] for layer in report["layers"] if layer["execute"] == "none"]
    lines += ["", "visual rows of one image that", console.table(header, rows), ""]
    if skipped:
        lines.append(f"layers not executed: {layer_numbers(skipped)}")
    lines += [
        f"positions {report['positions']}, mask {report['mask']}",
        f"mean visual tokens: {report['mean_visual_tokens']:.2f} of {flops['n']}",
        f"prefill, n = {flops['n']} visual and t = {flops['t']} text rows:",
    ]
    for name in ("macv", "mac2"):
        share = 100 * flops[f"{name}_of_dense"]
        lines.append(f"  {name.upper()} {_scaled(flops[name])} ({share:.2f} % of dense): {CONVENTIONS[name]}")
    if flops["selection_mac2"]:
        lines.append(f"  scoring adds {_scaled(flops['selection_mac2'])} (MAC2, in neither figure)")
    lines.append(
        f"KV cache after it, {kv['dtype']}: {kv['bytes']:,} bytes "
        f"({100 * kv['bytes'] / kv['bytes_dense']:.2f} % of dense)"
    )
    return "\n".join(lines)


def bundle_text(report: dict[str, Any]) -> str:
    """Files and engines for people."""
    lines = [
        f"bundle {report['path']}: format {report['format']}, {report['dtype']}, {report['bytes']:,} bytes, "
        f"by {report['producer']}",
        console.table(("file", "bytes"), list(report["files"].items())),
        f"checkpoint tensors that no graph uses: {len(report['ignored_tensors'])}",
    ]
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


def _remark(layer: dict[str, Any]) -> str:
    if layer["execute"] == "none":
        return "not executed"
    select = layer["select"]
    return f"selects {select['keep']} of {select['from']} by {select['by']}" if select else ""


def _settings(parameters: dict[str, Any], owner: str = "") -> list[str]:
    """As `calibrate --set` takes them, numbers with four digits."""
    lines: list[str] = []
    for name, value in parameters.items():
        if isinstance(value, dict):
            lines += _settings(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            lines.append(f"{owner}{name}=[{', '.join(map(_short, value))}]")
        else:
            lines.append(f"{owner}{name}={_short(value)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scaled(count: int) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4f} {unit}"
    return str(count)
