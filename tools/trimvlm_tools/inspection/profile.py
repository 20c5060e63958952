"""A profile: its schedule, budgets and costs. Everything follows from the schedule; nothing is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimvlm.rules import reads, rule_name
from trimvlm_tools import console

if TYPE_CHECKING:
    from trimvlm.profile import Profile
    from trimvlm.schedule import Row, Schedule

BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CONVENTIONS = {
    "macv": "visual rows only, one multiply-accumulate = 1, three FFN matrices",
    "mac2": "all rows, 2 per multiply-accumulate, three FFN matrices, no causal halving, no LM head",
}


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
        "key": profile.key,
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


def profile_text(report: dict[str, Any]) -> str:
    """The same for people."""
    from trimvlm.profile import layer_numbers

    model = report["model"]
    tokens = f"{model['visual_tokens']} visual tokens per image"
    if model["grid"]:
        tokens += f" of the grid {model['grid'][0]}x{model['grid'][1]}"
    lines = [
        f"profile {report['key']}: method {report['method']['name']}"
        + "".join(f", {setting}" for setting in _settings(report["method"]["parameters"])),
        f"model: {model['family']}, {geometry(model)}, {tokens}",
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
        f"mean visual tokens: {report['mean_visual_tokens']:.2f} of {model['visual_tokens']}",
        *cost_lines(report),
    ]
    return "\n".join(lines)


def geometry(model: dict[str, Any]) -> str:
    """Layers, widths and heads of a text model."""
    return (
        f"{model['layers']} layers, width {model['hidden']}, FFN {model['ffn']}, "
        f"{model['heads']}/{model['kv_heads']} heads of {model['head_dim']}"
    )


def cost_lines(report: dict[str, Any]) -> list[str]:
    """FLOPs and KV cache of a profile."""
    flops, kv = report["flops"], report["kv"]
    lines = [f"prefill, n = {flops['n']} visual and t = {flops['t']} text rows:"]
    for name in ("macv", "mac2"):
        share = 100 * flops[f"{name}_of_dense"]
        lines.append(f"  {name.upper()} {_scaled(flops[name])} ({share:.2f} % of dense): {CONVENTIONS[name]}")
    if flops["selection_mac2"]:
        lines.append(f"  scoring adds {_scaled(flops['selection_mac2'])} (MAC2, in neither figure)")
    lines.append(
        f"KV cache after it, {kv['dtype']}: {kv['bytes']:,} bytes "
        f"({100 * kv['bytes'] / kv['bytes_dense']:.2f} % of dense)"
    )
    return lines


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
