"""The report of `trimvlm bench` for people."""

from __future__ import annotations

from trimvlm_tools.bench.answers import Answers
from trimvlm_tools.bench.decoding import DecoderFigures
from trimvlm_tools.bench.harness import Spread
from trimvlm_tools.bench.operators import Operator, Products, Profiled
from trimvlm_tools.bench.peaks import Peaks
from trimvlm_tools.bench.points import PointFigures
from trimvlm_tools.bench.report import Report
from trimvlm_tools.bench.session_memory import SessionMemory
from trimvlm_tools.bench.size import Size
from trimvlm_tools.bench.stages import Steps
from trimvlm_tools.console import table

_LEAST_SHARE = 0.005  # of a run: smaller operators are left out


def as_text(report: Report) -> str:
    """The whole report."""
    parts = [_machine(report)]
    for each in report.points:
        parts += [_point(each), _resources(each)]
        parts += [_operators(each, name, found) for name, found in each.operators.items()]
    if report.peers:
        parts.append(_terms(report))
    if report.answers:
        parts.append(_answers(report.answers))
    if report.steps:
        parts.append(_steps(report.steps))
    parts.extend(_memory(name, memory) for name, memory in report.memory.items())
    if report.size:
        parts.append(_size(report.size))
    if report.bars:
        rows = [(bar.what, bar.measured, f"{bar.kind} {bar.bar:g}", bar.verdict) for bar in report.bars]
        parts.append(table(("bar", "measured", "asked", "verdict"), rows))
    parts.extend(f"{name} FAILED: {error}" for name, error in report.failures.items())
    return "\n\n".join(part for part in parts if part)


def _machine(report: Report) -> str:
    machine = report.machine
    warning = ""
    if not report.quiet:
        warning = "\nNOT QUIET: other work took part of the processors; do not rely on these times"
    load = f"{machine.load[0]:.2f}" if machine.load else "unknown"
    others = "unknown" if report.others_busy is None else f"{report.others_busy:.2f} processors"
    memory = "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.0f} GiB"
    return (
        f"{machine.cpu or 'unknown processor'}, {machine.cores} cores, "
        f"governor {machine.governor or 'unknown'}, {memory}; "
        f"onnxruntime {machine.versions.get('onnxruntime', 'none')}\n"
        f"{report.threads} threads, {report.processes} processes per contender, {report.runs} counted "
        f"rounds each; load before {load}, busy with other work {others}{warning}"
    )


def _point(figures: PointFigures) -> str:
    point = figures.point
    rows = [
        (
            each.name,
            _ms(each.prefill),
            _ms_of(each.prefill.min),
            _ms_of(each.prefill.max),
            _ratio(each.prefill_ratio),
            each.flops_ratio and round(each.flops_ratio, 4),
            each.over_flops and round(each.over_flops, 3),
            each.over_roofline and round(each.over_roofline, 3),
            each.over_in_turn and round(each.over_in_turn, 3),
            each.tokens_per_second and round(each.tokens_per_second, 2),
            _ratio(each.decode_ratio),
            _agreement(each),
        )
        for each in figures.contenders
    ]
    header = (
        "contender", "prefill ms", "min", "max", "of dense", "FLOPs", "time/FLOPs", "time/roofline",
        "in turn", "tokens/s", "decode of dense", "same tokens",
    )  # fmt: skip
    title = f"{point.visual} visual and {point.text} text rows, {point.new_tokens} new tokens"
    return f"{title}; {_peaks(figures.peaks)}\n{table(header, rows)}"


def _resources(figures: PointFigures) -> str:
    """Speeds against the peaks, where time goes and memory."""
    rows = []
    for each in figures.contenders:
        memory, held, split = each.memory, each.bytes, each.split
        rows.append(
            (
                each.name,
                round(each.open_seconds, 2),
                round(each.prefill_reached.flops_per_second / 1e9, 1),
                each.decode_reached and round(each.decode_reached.bytes_per_second / 1e9, 2),
                split and _share(split.first_host, split.first_graph),
                split and _share(split.decode_host, split.decode_graph),
                *((None,) * 3 if memory is None else _peaks_of_memory(memory.used)),
                held and _mb(held.weights),
                held and _mb(held.kv),
                held and _mb(held.kv_predicted),
                (held and held.activations is not None and _mb(held.activations)) or None,
            )
        )
    header = (
        "contender", "open s", "prefill GFLOP/s", "decode GB/s", "host % first", "host % token", "peak MB",
        "private", "mapped", "weights", "KV", "KV predicted", "activations",
    )  # fmt: skip
    return table(header, rows)


def _operators(point: PointFigures, name: str, found: Profiled) -> str:
    """Where a decoder's time goes, in a prefill and in a token."""
    at, head, parts = f"{name}, {point.point.name}", ("nodes", "ms", "%", "GFLOP/s", "GB/s"), []
    for what, operators in (("a prefill", found.prefill), ("a token", found.token)):
        whole = sum(each.seconds for each in operators)
        rows = [
            (each.name, *_speeds(each, whole)) for each in operators if each.seconds >= whole * _LEAST_SHARE
        ]
        title = f"{at}: {what}, {1000 * whole:.1f} ms with the profiler on"
        parts.append(f"{title}\n{table(('operator', *head), rows)}")
    whole = sum(each.seconds for each in found.prefill)
    rows = [(each.rows, *_speeds(each, whole)) for each in found.products]
    parts.insert(1, f"{at}: the prefill's products with weights\n{table(('rows', *head), rows)}")
    return "\n\n".join(parts)


def _speeds(each: Operator | Products, whole: float) -> tuple[float | None, ...]:
    """Nodes, milliseconds, per cent of the run, GFLOP/s and GB/s."""
    return (
        each.nodes,
        round(1000 * each.seconds, 2),
        round(100 * each.seconds / whole, 1),
        (each.flops and round(each.flops / each.seconds / 1e9, 1)) or None,
        (each.bytes and round(each.bytes / each.seconds / 1e9, 1)) or None,
    )


def _terms(report: Report) -> str:
    rows = [
        (name, ", ".join(f"{key}: {value}" for key, value in terms.settings.items()))
        for name, terms in report.peers.items()
    ]
    return table(("peer", "settings"), rows)


def _peaks_of_memory(used) -> tuple[float, float, float]:
    return _mb(used.peak), _mb(used.anonymous_peak), _mb(used.file_peak)


def _peaks(peaks: Peaks | None) -> str:
    if peaks is None:
        return "the machine's peaks were not measured"
    return (
        f"peaks {peaks.flops / 1e9:.0f} GFLOP/s ({peaks.by['flops']}), reading {peaks.read / 1e9:.1f} GB/s "
        f"({peaks.by['read']}), copy {peaks.copy / 1e9:.1f} GB/s, ONNX Runtime's products of one row "
        f"{peaks.rows / 1e9:.1f} GB/s"
    )


def _agreement(each: DecoderFigures) -> str | None:
    if each.agreement is None:
        return None
    logits = each.agreement.logits
    return f"{each.agreement.tokens}/{each.agreement.of}" + (
        "" if logits is None else f", logits {logits:.0e}"
    )


def _answers(answers: Answers) -> str:
    rows = [
        (
            each.profile,
            answers.kept[each.profile],
            _ms(each.first_token),
            _ratio(answers.ratios[each.profile]),
            *(_ms(part) for part in (each.preprocess, each.vision, each.select, each.prefill)),
            round(100 * each.first_host_share, 2),
        )
        for each in answers.ours
    ]
    rows += [
        (each.peer, each.keep, _ms(each.first_token), _ratio(each.ratio), None, None, None, None, None)
        for each in answers.peers
    ]
    header = (
        "answer", "tokens kept", "first token ms", "of dense", "preprocess", "vision", "select", "prefill",
        "host %",
    )  # fmt: skip
    return f"{answers.visual} visual and {answers.text} text rows, first token\n{table(header, rows)}"


def _steps(steps: tuple[Steps, ...]) -> str:
    rows = [
        (
            s.profile,
            *(_ms(part) for part in (s.preprocess, s.vision, s.select, s.prefill, s.first_token)),
            round(100 * s.first_host_share, 2),
            s.tokens_per_second and round(s.tokens_per_second, 1),
            s.decode_tokens,
            (s.decode_host_share is not None and round(100 * s.decode_host_share, 2)) or None,
            *((None,) * 3 if s.memory is None else _peaks_of_memory(s.memory.used)),
        )
        for s in steps
    ]
    header = (
        "profile", "preprocess ms", "vision", "select", "prefill", "first token", "host %", "tokens/s",
        "decoded", "host %", "peak MB", "private", "mapped",
    )  # fmt: skip
    return table(header, rows)


def _memory(name: str, memory: SessionMemory) -> str:
    states = [
        ("empty Python", memory.empty),
        ("+ imports", memory.imports),
        ("+ open session", memory.opened),
        ("+ prefill, decode", memory.used),
        ("the same, low_memory", memory.low_memory),
        (f"choice of {' and '.join(memory.together)}", memory.choice_opened),
        ("+ an answer of each", memory.choice),
    ]
    rows = [
        (state, *(_mb(x) for x in (m.peak, m.anonymous_peak, m.anonymous, m.file, m.weights)))
        for state, m in states
        if m
    ]
    header = (f"session of {name}, MB", "peak", "peak private", "private", "file-backed", "mapped weights")
    return (
        f"{table(header, rows)}\nweights {_mb(memory.weight_bytes)} MB; rows after the first are above the "
        f"empty process; peak {memory.peak_over_weights:.3f} of the weights; opened again in "
        f"{memory.open_seconds:.2f} s"
    )


def _size(size: Size) -> str:
    return (
        f"bundle {size.bundle / 1e6:.1f} MB with {size.profiles} profiles, {size.over_checkpoint:.4f} of the "
        f"checkpoint; a profile adds {size.per_profile / 1e6:.2f} MB"
    )


def _share(part: Spread | None, rest: Spread | None) -> float | None:
    """Per cent."""
    if part is None or rest is None:
        return None
    return round(100 * part.median / (part.median + rest.median), 2)


def _ms(spread: Spread | None) -> float | None:
    return spread and _ms_of(spread.median)


def _ms_of(seconds: float) -> float:
    return round(1000 * seconds, 1)


def _ratio(spread: Spread | None) -> float | None:
    return spread and round(spread.median, 4)


def _mb(size: int) -> float:
    return round(size / 1e6, 1)
