"""Where one of our decoders spends its time, operator by operator, by ONNX Runtime's own profiler.

`python -m ... SPEC.json BYTES`: the specification of `decoder_worker.py`, and how many bytes a value of a
weight takes; prints the figures as JSON. A process of its own, in no race: the profiler takes time itself.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from trimvlm.value import Value
from trimvlm_tools.bench.harness import ContenderError, last_words

PRODUCTS = {"Gemm": True, "MatMulNBits": True, "MatMul": False, "FusedMatMul": False}  # with a weight
BETWEEN = "between nodes"
_PREFILLS, _TOKENS = 4, 10  # the first of each is not counted: it finds nothing warm, it grows the caches


class Operator(Value, frozen=True, kw_only=True):
    """All nodes of one operator in one run of the graph.

    Attributes:
        nodes: how many.
        seconds: of all of them.
        flops: of matrix products, 2 per multiply-accumulate; else 0.
        bytes: of the weight matrices that they read; else 0.
    """

    name: str
    nodes: int
    seconds: float
    flops: int
    bytes: float


class Products(Value, frozen=True, kw_only=True):
    """All products of equally many rows with a weight matrix in one run of the graph; see `Operator`."""

    rows: int
    nodes: int
    seconds: float
    flops: int
    bytes: float


class Profiled(Value, frozen=True, kw_only=True):
    """A prefill and a decode step, each the one of several that took the median time.

    Attributes:
        prefill, token: the slowest operators first; what no node accounts for is last.
        products: of the prefill, the most rows first.
    """

    prefill: tuple[Operator, ...]
    token: tuple[Operator, ...]
    products: tuple[Products, ...]


def profile_decoder(spec: Path, value_bytes: float) -> Profiled:
    """Runs the profiler in a fresh process.

    Args:
        spec: see `decoder_worker.py`.
        value_bytes: of one value of a weight matrix.

    Raises:
        ContenderError: it failed; the message is its own last words.
    """
    command = (sys.executable, "-m", "trimvlm_tools.bench.operators", str(spec), str(value_bytes))
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ContenderError(last_words(found.stderr, found.returncode))
    return msgspec.json.decode(found.stdout.splitlines()[-1], type=Profiled)


def summed(events: Sequence[Mapping[str, Any]], run: int, value_bytes: float) -> tuple[Operator, ...]:
    """What the profiler noted of one run.

    Args:
        events: of ONNX Runtime's profile.
        run: number of the session's run.
    """
    nodes: dict[str, list[tuple[float, int, int]]] = {}
    for name, micros, arguments in _kernels(events, run):
        nodes.setdefault(name, []).append((micros, *_product(name, arguments)))
    found = [Operator(name=name, **_sum(each, value_bytes)) for name, each in nodes.items()]
    found.sort(key=lambda each: -each.seconds)
    start, end = _spans(events)[run]
    rest = (end - start) / 1e6 - sum(each.seconds for each in found)
    return (*found, Operator(name=BETWEEN, nodes=0, seconds=rest, flops=0, bytes=0))


def by_rows(events: Sequence[Mapping[str, Any]], run: int, value_bytes: float) -> tuple[Products, ...]:
    """The products with weights among what `summed` sums, by their rows: what the kernels reach at each."""
    found: dict[int, list[tuple[float, int, int]]] = {}
    for name, micros, arguments in _kernels(events, run):
        flops, values = _product(name, arguments)
        if values:
            found.setdefault(flops // (2 * values), []).append((micros, flops, values))
    return tuple(
        Products(rows=rows, **_sum(found[rows], value_bytes)) for rows in sorted(found, reverse=True)
    )


def middle(events: Sequence[Mapping[str, Any]], runs: Sequence[int]) -> int:
    """The run whose duration is the median: a mean would be the slowest one's."""
    spans = _spans(events)
    return sorted(runs, key=lambda run: spans[run][1] - spans[run][0])[len(runs) // 2]


def _spans(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Microseconds at which each run starts and ends."""
    return [(each["ts"], each["ts"] + each["dur"]) for each in events if each["name"] == "model_run"]


def _kernels(events: Sequence[Mapping[str, Any]], run: int) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Operator, microseconds and arguments of every node that ran; of an If its branch's nodes alone."""
    start, end = _spans(events)[run]
    for each in events:
        if each.get("cat") != "Node" or not each["name"].endswith("_kernel_time"):
            continue
        name = each["args"]["op_name"]
        if name != "If" and start <= each["ts"] < end:
            yield name, each["dur"], each["args"]


def _sum(nodes: Sequence[tuple[float, int, int]], value_bytes: float) -> dict[str, Any]:
    """Of nodes' microseconds, FLOPs and values of weights."""
    return {
        "nodes": len(nodes),
        "seconds": sum(micros for micros, _, _ in nodes) / 1e6,
        "flops": sum(flops for _, flops, _ in nodes),
        "bytes": value_bytes * sum(values for _, _, values in nodes),
    }


def _product(name: str, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs of a matrix product and values of its weight matrix; zeros for anything else."""
    if name not in PRODUCTS:
        return 0, 0
    (x,) = arguments["input_type_shape"][0].values()
    (y,) = arguments["output_type_shape"][0].values()
    return 2 * math.prod(y) * x[-1], x[-1] * y[-1] if PRODUCTS[name] else 0


def main() -> None:
    """Opens the decoder, runs a prompt some times, then some tokens, and prints what the middle ones took."""
    import numpy as np

    from trimvlm.bundle import Bundle
    from trimvlm.decoding import Decoder, generate_ids
    from trimvlm.text import Prompt
    from trimvlm_tools.bench.decoder_worker import open_decoder

    spec = json.loads(Path(sys.argv[1]).read_text())
    with np.load(spec["rows"]) as stored:
        rows = {name: stored[name] for name in stored.files}
    visual_ND, prompt = rows.pop("visual"), Prompt(**rows)
    backend = open_decoder(Bundle(spec["bundle"]), spec)
    options = backend.options
    with tempfile.TemporaryDirectory() as scratch:

        def profiled(role: str) -> Any:
            made = options(role)
            made.enable_profiling, made.profile_file_prefix = True, str(Path(scratch) / "profile")
            return made

        backend.options = profiled
        with backend:
            caches = [name for name in backend.outputs("decoder") if name.startswith("present_")]
            decoder = Decoder(backend, ["logits"], caches)
            for tokens in (*(1,) * (_PREFILLS - 1), 1 + _TOKENS):
                list(generate_ids(decoder, prompt, visual_ND, _greedy, eos_ids=(), max_new_tokens=tokens))
            events = json.loads(Path(backend.sessions["decoder"].end_profiling()).read_text())
    value_bytes = float(sys.argv[2])
    prompt_run = middle(events, range(1, _PREFILLS))
    token_run = middle(events, range(_PREFILLS + 1, _PREFILLS + _TOKENS))
    found = Profiled(
        prefill=summed(events, prompt_run, value_bytes),
        token=summed(events, token_run, value_bytes),
        products=by_rows(events, prompt_run, value_bytes),
    )
    print(msgspec.json.encode(found).decode())


def _greedy(logits_V: Any) -> int:
    return int(logits_V.argmax())


if __name__ == "__main__":
    main()
