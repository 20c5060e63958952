"""What the machine can do at most, measured by a contender of its own. `python -m ... SPEC.json`.

Each `run` takes the best of a few passes: FLOP/s of a large float32 matrix product, by ONNX Runtime and by
numpy; bytes/s of reading memory, by the C library's search for a byte and by numpy's largest value; bytes/s
of a copy, read and written bytes together; bytes/s of weights that ONNX Runtime reads in float32 products of
one row, in a graph of nothing else. All with the given number of threads. Speaks the protocol of `worker.py`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimvlm_tools.bench.worker import own_stdout, say

PASSES = 3


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Serves `run` for `spec`: `threads`, `side` of the square matrices, `bytes` that are read and copied."""
    threads = spec["threads"]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # before numpy is there
        os.environ[name] = str(threads)
    import numpy as np

    started = time.perf_counter()
    a, b = np.random.default_rng(0).standard_normal((2, spec["side"], spec["side"]), dtype=np.float32)
    source, target = np.ones(spec["bytes"], np.uint8), np.ones(spec["bytes"], np.uint8)
    flops = 2 * spec["side"] ** 3
    onnx_product = onnxruntime_products(a, [b], threads)
    # Products of one row as a decoder has them, a feed forward network's; as many as make the bytes to read.
    wide = 4 * spec["side"]
    pairs = max(1, spec["bytes"] // (8 * spec["side"] * wide))
    up, down = (
        np.full((spec["side"], wide), 1e-3, np.float32),
        np.full((wide, spec["side"]), 1e-3, np.float32),
    )
    rows = onnxruntime_products(a[:1], [up, down] * pairs, threads)
    say(replies, {"ready": os.getpid(), "open_seconds": time.perf_counter() - started})
    with ThreadPoolExecutor(threads) as pool:

        def everywhere(work: Callable[[Any, Any], object]) -> Callable[[], object]:
            pieces = zip(np.array_split(source, threads), np.array_split(target, threads), strict=True)
            pairs = list(pieces)
            return lambda: list(pool.map(lambda pair: work(*pair), pairs))

        probes = {
            "flops_onnxruntime": (flops, onnx_product),
            "flops_numpy": (flops, lambda: a @ b),
            "read_numpy": (spec["bytes"], everywhere(lambda piece, _: piece.view(np.int64).max())),
            "rows_onnxruntime": (pairs * (up.nbytes + down.nbytes), rows),
            "copy": (2 * spec["bytes"], everywhere(lambda piece, to: np.copyto(to, piece))),
        }
        if search := find_byte():
            probes["read_libc"] = (
                spec["bytes"],
                everywhere(lambda piece, _: search(piece.ctypes.data, 0, piece.size)),
            )
        for line in commands:
            if line.strip() != "run":
                raise SystemExit(f"no command {line.strip()!r}")
            wall, cpu = time.perf_counter(), time.process_time()
            found = {name: amount / best(work) for name, (amount, work) in probes.items()}
            spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            say(replies, spent | found)


def best(work: Callable[[], object]) -> float:
    """Least seconds of a few passes."""
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def onnxruntime_products(x: Any, weights: Sequence[Any], threads: int) -> Callable[[], object]:
    """`x @ w1 @ w2 ...` by ONNX Runtime. Every kernel has its own copy of its weight."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    names = [f"x{number}" for number in range(len(weights) + 1)]
    nodes = [
        helper.make_node("MatMul", [before, f"w{id(weight)}"], [after])
        for (before, after), weight in zip(pairwise(names), weights, strict=True)
    ]
    given = [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, x.shape)]
    made = [helper.make_tensor_value_info(names[-1], TensorProto.FLOAT, (len(x), weights[-1].shape[1]))]
    kept = [
        numpy_helper.from_array(each, f"w{id(each)}")
        for each in {id(each): each for each in weights}.values()
    ]
    graph = helper.make_graph(nodes, "products", given, made, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {names[0]: onnxruntime.OrtValue.ortvalue_from_numpy(x)}
    return lambda: session.run_with_ort_values(names[-1:], feeds)


def find_byte() -> Callable[[int, int, int], object] | None:
    """C's memchr, which does nothing but read; None where there is no such library."""
    import ctypes

    try:
        search = ctypes.CDLL(None).memchr
    except (OSError, TypeError, AttributeError):
        return None
    search.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    search.restype = ctypes.c_void_p
    return search


def main() -> None:
    """Serves until the commands end."""
    replies = own_stdout()
    serve(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
