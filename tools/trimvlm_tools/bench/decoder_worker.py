"""Our own process for the decoder's workload, `python -m ... SPEC.json`: rows of a prompt in, tokens out.

The token loop and the backend are those of a Session; only the decoder's graph is loaded. Speaks the protocol
of `worker.py`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimvlm_tools.bench.worker import own_stdout, resident, say


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Serves the decoder of `spec`: `bundle`, `profile`, `target`, `threads`, `rows` (.npz), `new_tokens`."""
    import numpy as np
    import onnxruntime  # noqa: F401 - to know what it holds before any weights are there

    from trimvlm.bundle import Bundle
    from trimvlm.decoding import Decoder, generate_ids
    from trimvlm.text import Prompt
    from trimvlm_tools.bench.clocked import Clocked, GraphRun, split

    with np.load(spec["rows"]) as stored:
        rows = {name: stored[name] for name in stored.files}
    visual_ND = rows.pop("visual")
    prompt, imports = Prompt(**rows), resident()
    started = time.perf_counter()
    runs: list[GraphRun] = []
    held: dict[str, Any] = {}

    def greedy(logits_V: Any) -> int:
        held.setdefault("logits", logits_V)
        return int(np.argmax(logits_V))

    with Clocked(open_decoder(Bundle(spec["bundle"]), spec), runs) as backend:
        caches = [name for name in backend.outputs("decoder") if name.startswith("present_")]
        graph = Decoder(backend, ["logits"], caches)

        def decoder(inputs: dict[str, Any]) -> dict[str, Any]:
            outputs = graph(inputs)
            if "kv_bytes" not in held:
                held["kv_bytes"] = kv_bytes(outputs)
            return outputs

        say(
            replies,
            {"ready": os.getpid(), "open_seconds": time.perf_counter() - started, "imports": imports},
        )
        tokens: list[int] = []
        for line in commands:
            command, _, argument = line.strip().partition(" ")
            if command == "run":
                tokens = []
                held.clear()
                runs.clear()
                cpu, start = time.process_time(), time.perf_counter()
                answer = generate_ids(
                    decoder, prompt, visual_ND, greedy, eos_ids=(), max_new_tokens=spec["new_tokens"]
                )
                tokens.append(next(answer))
                prefill = time.perf_counter() - start
                tokens.extend(answer)
                end = time.perf_counter()
                figures = {
                    "seconds": end - start,
                    "cpu_seconds": time.process_time() - cpu,
                    "prefill": prefill,
                    "decode": end - start - prefill,
                    "kv_bytes": held["kv_bytes"],
                }
                say(replies, figures | split(runs, start, end))
            elif command == "save":
                np.savez(argument, tokens=np.array(tokens, np.int64), logits=held["logits"])
                say(replies, {"saved": argument})
            else:
                raise SystemExit(f"no command {command!r}")


def open_decoder(bundle: Any, spec: Mapping[str, Any]) -> Any:
    """What a Session would open for a profile and a target of ONNX Runtime, but for the decoder alone."""
    from trimvlm.backends.blocks import part_of
    from trimvlm.backends.run_onnxruntime import OnnxRuntimeBackend
    from trimvlm.opening import open_backends

    (backend,) = open_backends(bundle, spec["profile"], spec["target"], {"threads": spec["threads"]}).values()
    assert isinstance(backend, OnnxRuntimeBackend), "blocks of layers are not measured here"
    backend.files = {role: file for role, file in backend.files.items() if part_of(role) == "decoder"}
    return backend


def kv_bytes(outputs: Mapping[str, Any]) -> int:
    """Bytes of the keys and values that a run leaves for the next one, as they are held."""
    from trimvlm.backends import PRESENT_CACHES
    from trimvlm.backends.run_onnxruntime import DTYPES

    total = 0
    for name, held in outputs.items():
        if name == PRESENT_CACHES:  # in buffers of their own
            total += sum(buffer.nbytes for buffer in held.caches.buffers.values())
        elif name.startswith(("present_key", "present_value")):
            total += math.prod(held.shape()) * DTYPES[held.data_type()].itemsize
    return total


def main() -> None:
    """Serves until the commands end."""
    replies = own_stdout()
    serve(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
