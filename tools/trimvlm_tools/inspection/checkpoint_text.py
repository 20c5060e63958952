"""The report on a checkpoint for people."""

from __future__ import annotations

from typing import Any

from trimvlm_tools import console
from trimvlm_tools.inspection.bundle import reasons
from trimvlm_tools.inspection.graphs import graph_table
from trimvlm_tools.inspection.profile import cost_lines, geometry

NOT_KNOWN = "not known; see the problems below"


def checkpoint_text(report: dict[str, Any]) -> str:
    """Everything but what is None; the last line says whether export takes the model."""
    where = f" ({report['path']})" if report["path"] != report["name"] else ""
    parts = [
        "\n".join([f"model {report['name']}{where}: {report['family']}", *_geometry(report)]),
        _weights(report["stored"], report["tensors"]),
        _graphs(report["graphs"] or {}),
        _costs(report),
        _end(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _geometry(report: dict[str, Any]) -> list[str]:
    text, vision, image = report["text"], report["vision"], report["image"]
    lines = []
    if text:
        tied = ", LM head tied to the embeddings" if text["tied"] else ""
        lines.append(f"text model: {text['model_type']}, {geometry(text)}, vocabulary {text['vocab']}{tied}")
    if vision:
        parts = [
            vision["model_type"],
            f"{vision['layers']} layers",
            f"features {', '.join(map(str, vision['features']))} of width {vision['width']}",
            "[CLS]" if vision["cls"] else "[CLS] read but not shown" if vision["hidden_cls"] else "no [CLS]",
        ]
        parts += [f"{vision['patches']} tokens a view"] if vision["patches"] is not None else []
        parts += [f"{vision['views']} views"] if (vision["views"] or 1) > 1 else []
        lines.append(f"vision tower: {', '.join(parts)}")
    return lines + (_image(image) if image else [])


def _image(image: dict[str, Any]) -> list[str]:
    processing, grid = image["processing"], image["grid"]
    if processing is None:
        return [f"images: {NOT_KNOWN}"]
    shown = {key: f"{len(value)} sizes" if key == "canvases" else value for key, value in processing.items()}
    settings = ", ".join(f"{key}={value}" for key, value in shown.items() if key not in {"kind", "rescale"})
    lines = [f"images: {processing['kind']}, {settings}"]
    if grid:
        fitted = "" if image["natural"] else "; they are made to fit it"
        lines.append(
            f"images of {image['size'][0]}x{image['size'][1]} pixels: grid {grid[0]}x{grid[1]}, "
            f"{image['visual_tokens']} visual tokens{fitted}"
        )
    elif processing["kind"] == "single_view":
        lines.append(f"every image is one view: {image['visual_tokens']} visual tokens")
    else:
        lines.append("visual tokens, FLOPs and KV cache depend on the image: give its size, --image-size WxH")
    return lines


def _weights(stored: dict[str, Any] | None, tensors: dict[str, Any] | None) -> str | None:
    if stored is None:
        return None
    lines = [
        f"weights: {stored['tensors']} tensors, {stored['parameters']:,} parameters, "
        f"{stored['bytes']:,} bytes",
        console.table(("file", "bytes"), list(stored["files"].items())),
        "",
    ]
    rows = [(f"stored in {dtype}", *found.values()) for dtype, found in stored["dtypes"].items()]
    if tensors:
        used = {role: found for role, found in tensors["consumed"].items() if found}
        rows += [(f"{role} graph", *found.values()) for role, found in used.items()]
        rows.append(("ignored", *tensors["ignored_sizes"].values()))
    lines.append(console.table(("", "tensors", "parameters", "bytes"), rows))
    if tensors and tensors["ignored"]:
        lines += ["ignored, and why:", *reasons(tensors["ignored"])]
    return "\n".join(lines)


def _graphs(graphs: dict[str, Any]) -> str | None:
    known = {role: graph for role, graph in graphs.items() if graph}
    lines = [
        f"{role} graph:\n{graph_table(graph['inputs'], graph['outputs'])}" for role, graph in known.items()
    ]
    return "\n".join(lines) or None


def _costs(report: dict[str, Any]) -> str | None:
    if report["kv_bytes_per_token"] is None:
        return None
    lines = [f"KV cache of a token, float16: {report['kv_bytes_per_token']:,} bytes"]
    if report["profile"]:
        lines += ["dense, with one image:", *cost_lines(report["profile"])]
    return "\n".join(lines)


def _end(report: dict[str, Any]) -> str:
    lines = []
    if report["prompt"] is not None:
        lines.append(f"chat template: {report['prompt']!r}")
    problems = report["problems"]
    if problems:
        count = f"{len(problems)} problem{'s'[: len(problems) != 1]}"
        return "\n".join(
            [*lines, "problems:", *(f"  {problem}" for problem in problems), f"export refuses it: {count}"]
        )
    image = report["image"]
    depends = image["processing"]["kind"] != "single_view" and not image["grid"]
    return "\n".join([*lines, f"export takes it{', with --image-size WxH' if depends else ''}"])
