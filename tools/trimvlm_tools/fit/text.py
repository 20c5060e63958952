"""A prediction for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trimvlm_tools import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trimvlm.target import Target
    from trimvlm_engines.fit.changes import Change
    from trimvlm_engines.fit.prediction import Prediction
    from trimvlm_engines.fit.roofline import Work

MIB = 1 << 20


def prediction_text(found: Prediction, target: Target, changes: Sequence[Change]) -> str:
    """The whole report."""
    asked, largest = found.request, found.memory.at_once[0]
    lines = [
        f"{found.profile} in {found.dtype} on {target.name} ({target.device}): {asked.images} images, "
        f"{asked.text} text rows, {asked.new_tokens} new tokens",
        "predicted, not measured" + ("" if target.tested.run else "; nothing was ever run on this target"),
        "",
        _memory(found),
        f"KV cache at the end of this answer: {_per_layer(found.kv_layers)}",
        f"largest piece at once: {_mib(largest.bytes)}, {largest.name}",
        "",
        *_verdict(found),
    ]
    if changes:
        lines += ["", "what would fit, each predicted:", *(f"  {_change(change)}" for change in changes)]
    elif found.problems:
        lines += ["", "no change of profile, precision, sizes or target that was tried makes it fit"]
    if found.times is not None:
        lines += ["", *_times(found)]
    unknown = [*found.unknown, *(found.times.unknown if found.times else ())]
    lines += [f"unknown: {what}" for what in unknown]
    return "\n".join(lines)


def _memory(found: Prediction) -> str:
    memory = found.memory
    rows: list[tuple[Any, ...]] = [
        (piece.name, round(piece.bytes / MIB, 1), piece.basis, piece.note) for piece in memory.pieces
    ]
    together = sum(piece.bytes for piece in memory.pieces)
    rows.append(("together", round(together / MIB, 1), "", ""))
    if memory.opening > together:
        rows.append(("while it opens", round(memory.opening / MIB, 1), "", "a weight and its copy at once"))
    return console.table(("memory", "MiB", "basis", ""), rows)


def _per_layer(layers: tuple[int, ...]) -> str:
    """`24 layers of 1.5 MiB`, or a list of runs of equal layers."""
    runs: list[list[int]] = []
    for layer, size in enumerate(layers):
        if runs and layers[runs[-1][0]] == size:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    said = [
        f"{_mib(layers[run[0]])} in layer{'s' if len(run) > 1 else ''} "
        + (f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
        for run in runs
    ]
    return f"{_mib(sum(layers))}: {', '.join(said)}"


def _verdict(found: Prediction) -> list[str]:
    if found.problems:
        return ["does NOT fit", *(f"  {problem}" for problem in found.problems)]
    if found.fits is None:
        return [f"needs {_mib(found.memory.peak)}; whether that fits, the target does not say"]
    assert found.usable is not None and found.left is not None
    how = ", with the engines before the decoder and the decoder's taking turns" if found.takes_turns else ""
    return [f"fits{how}: {_mib(found.left)} of {_mib(found.usable)} stay free"]


def _change(change: Change) -> str:
    free = "" if change.left is None else f", {_mib(change.left)} free"
    return f"{change.what}: {_mib(change.peak)}{free}{', taking turns' if change.takes_turns else ''}"


def _times(found: Prediction) -> list[str]:
    times = found.times
    assert times is not None
    rows = [
        _work("before the decoder", times.before),
        _work("prefill", times.prefill),
        _work("a token", times.step),
    ]
    lines = [
        "time, ESTIMATED from the target's peak and bandwidth: the least that is possible, never measured",
        console.table(("", "GFLOP", "GB", "ms at least"), rows),
    ]
    if times.first_token is not None and times.tokens_per_second is not None:
        lines.append(
            f"first token after {1000 * times.first_token:.4g} ms at the earliest, then at most "
            f"{times.tokens_per_second:.4g} tokens/s"
        )
    return lines


def _work(name: str, work: Work) -> tuple[Any, ...]:
    return name, work.flops / 1e9, work.bytes / 1e9, None if work.seconds is None else 1000 * work.seconds


def _mib(size: int) -> str:
    return f"{size / MIB:,.1f} MiB"
