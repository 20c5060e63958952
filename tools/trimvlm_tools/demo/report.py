"""The demo's table, and its self-contained HTML report."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from matplotlib.figure import Figure

from trimvlm_tools.console import table
from trimvlm_tools.demo.figures import accuracy_figure, curve_figure, survivor_figure
from trimvlm_tools.demo.pipeline import DemoResult
from trimvlm_tools.parity.text import as_text

HEADER = (
    "method",
    "visual tokens",
    "FLOPs %",
    "KV MB",
    "first token ms",
    "preprocess",
    "vision",
    "select",
    "prefill",
    "decode tok/s",
    "exact match %",
    "parity",
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222 }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } td, th { padding: 3px 9px; text-align: right }
th { border-bottom: 2px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f4f4f4 } img { max-width: 100% } pre { font-size: 11px; overflow-x: auto }
"""


def rows(result: DemoResult) -> list[list[str | float | None]]:
    """One line per method, under `HEADER`; times in milliseconds."""
    lines: list[list[str | float | None]] = []
    for method in result.methods:
        m = method.measured
        times = (m.first_token, m.preprocess, m.vision, m.select, m.prefill)
        lines.append(
            [
                method.profile.name,
                round(method.mean_visual_tokens, 1),
                round(100 * method.flops_ratio, 1),
                round(method.kv_bytes / 1e6, 2),
                *(None if seconds is None else round(1e3 * seconds, 2) for seconds in times),
                None if m.tokens_per_second is None else round(m.tokens_per_second),
                round(100 * m.exact_match, 1),
                method.parity.verdict,
            ]
        )
    return lines


def as_text_table(result: DemoResult) -> str:
    """The table for the console."""
    notes = [
        f"{method.profile.name}: made for weights that were trained with it; as is, it loses accuracy"
        for method in result.methods
        if method.profile.needs_adapted_weights
    ]
    head = f"{result.questions} held-out questions, {result.text} text rows, medians; {result.machine['cpu']}"
    return "\n".join([table(HEADER, rows(result)), "", head, *notes])


def write_report(result: DemoResult, path: Path) -> None:
    """Writes the HTML page; pictures and styles are inside it."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{'-' if cell is None else html.escape(str(cell))}</td>" for cell in line)
        + "</tr>"
        for line in rows(result)
    )
    pictures = embedded(survivor_figure(result))
    curves = "".join(
        f"<h3>{html.escape(method.profile.name)}</h3>{embedded(figure)}"
        for method in result.methods
        if (figure := curve_figure(method)) is not None
    )
    parity = html.escape("\n\n".join(as_text(method.parity) for method in result.methods))
    machine = html.escape(", ".join(f"{key} {value}" for key, value in result.machine.items()))
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>trimvlm demo</title>
<style>{STYLE}</style></head><body>
<h1>trimvlm demo</h1>
<p>{result.questions} held-out questions, {result.text} text rows a prompt, medians. FLOPs: prefill of the
decoder, MAC2, relative to dense. Selection is part of the decoder graph, so it has no time of its own.
{machine}.</p>
<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>
<h2>Accuracy against FLOPs</h2>{embedded(accuracy_figure(result))}
<h2>Which visual tokens survive</h2>
<p>Methods that drop tokens, for one held-out question. Faded patches are gone from the layers named above
each picture.</p>{pictures}
<h2>What calibration measured</h2>{curves}
<h2>Parity</h2><pre>{parity}</pre>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def write_pictures(result: DemoResult, directory: Path) -> None:
    """The two pictures of the README."""
    survivor_figure(result).savefig(directory / "survivors.png", dpi=110)
    accuracy_figure(result).savefig(directory / "accuracy.png", dpi=130)


def embedded(figure: Figure) -> str:
    """An <img> with the picture inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
