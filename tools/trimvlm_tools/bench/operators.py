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
_TOKENS = 9  # the first is not counted: it grows the caches


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
    """A prefill and a mean decode step.

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


def summed(
    events: Sequence[Mapping[str, Any]], runs: Sequence[int], value_bytes: float
) -> tuple[Operator, ...]:
    """What the profiler noted of some runs, per run.

    Args:
        events: of ONNX Runtime's profile.
        runs: numbers of the session's runs that count.
    """
    nodes: dict[str, list[tuple[float, int, int]]] = {}
    for name, micros, arguments in _kernels(events, runs):
        nodes.setdefault(name, []).append((micros, *_product(name, arguments)))
    found = [Operator(name=name, **_sum(each, len(runs), value_bytes)) for name, each in nodes.items()]
    found.sort(key=lambda each: -each.seconds)
    whole = sum(end - start for start, end in _spans(events, runs)) / 1e6 / len(runs)
    rest = whole - sum(each.seconds for each in found)
    return (*found, Operator(name=BETWEEN, nodes=0, seconds=rest, flops=0, bytes=0))


def by_rows(
    events: Sequence[Mapping[str, Any]], runs: Sequence[int], value_bytes: float
) -> tuple[Products, ...]:
    """The products with weights among what `summed` sums, by their rows: what the kernels reach at each."""
    found: dict[int, list[tuple[float, int, int]]] = {}
    for name, micros, arguments in _kernels(events, runs):
        flops, values = _product(name, arguments)
        if values:
            found.setdefault(flops // (2 * values), []).append((micros, flops, values))
    return tuple(
        Products(rows=rows, **_sum(found[rows], len(runs), value_bytes))
        for rows in sorted(found, reverse=True)
    )


def _spans(events: Sequence[Mapping[str, Any]], runs: Sequence[int]) -> list[tuple[float, float]]:
    """Microseconds at which the runs start and end."""
    spans = [(each["ts"], each["ts"] + each["dur"]) for each in events if each["name"] == "model_run"]
    return [spans[number] for number in runs]


def _kernels(
    events: Sequence[Mapping[str, Any]], runs: Sequence[int]
) -> Iterator[tuple[str, float, Mapping[str, Any]]]:
    """Operator, microseconds and arguments of every node that ran; of an If its branch's nodes alone."""
    wanted = _spans(events, runs)
    for each in events:
        if each.get("cat") != "Node" or not each["name"].endswith("_kernel_time"):
            continue
        name = each["args"]["op_name"]
        if name != "If" and any(start <= each["ts"] < end for start, end in wanted):
            yield name, each["dur"], each["args"]


def _sum(nodes: Sequence[tuple[float, int, int]], runs: int, value_bytes: float) -> dict[str, Any]:
    """Per run, of nodes' microseconds, FLOPs and values of weights."""
    return {
        "nodes": len(nodes) // runs,
        "seconds": sum(micros for micros, _, _ in nodes) / 1e6 / runs,
        "flops": sum(flops for _, flops, _ in nodes) // runs,
        "bytes": value_bytes * sum(values for _, _, values in nodes) / runs,
    }


def _product(name: str, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs of a matrix product and values of its weight matrix; zeros for anything else."""
    if name not in PRODUCTS:
        return 0, 0
    (x,) = arguments["input_type_shape"][0].values()
    (y,) = arguments["output_type_shape"][0].values()
    return 2 * math.prod(y) * x[-1], x[-1] * y[-1] if PRODUCTS[name] else 0


def main() -> None:
    """Opens the decoder, runs a prompt twice and a few tokens, and prints what the second time took."""
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
            for tokens in (1, 1 + _TOKENS):
                list(generate_ids(decoder, prompt, visual_ND, _greedy, eos_ids=(), max_new_tokens=tokens))
            events = json.loads(Path(backend.sessions["decoder"].end_profiling()).read_text())
    value_bytes = float(sys.argv[2])
    prefill, token = summed(events, [1], value_bytes), summed(events, range(3, 2 + _TOKENS), value_bytes)
    found = Profiled(prefill=prefill, token=token, products=by_rows(events, [1], value_bytes))
    print(msgspec.json.encode(found).decode())


def _greedy(logits_V: Any) -> int:
    return int(logits_V.argmax())


if __name__ == "__main__":
    main()
