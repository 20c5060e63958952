"""A peer's process: holds its model and runs it when told. `python -m ... SPEC.json`.

Speaks the protocol of `bench/worker.py`. `run` replies with `seconds`, `cpu_seconds` and, for a decoder,
`prefill` and `decode`, for an answer `first_token`. `save FILE` writes a decoder's last run as .npz: `tokens`
(int64) and, where the peer gives them away, `logits` (float32 [V]).

SPEC: `peer`, `precision`, `workload`; for `convert` also `checkpoint` and `directory`; for `decoder` and
`answer` also `model` (a converted directory) and `threads`, and then `ids` (an .npy file) and `new_tokens`,
or `image`, `question` and `keep`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimvlm_tools.bench.peers import Decoded, Peer, find_peer
from trimvlm_tools.bench.worker import own_stdout, say


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Opens the model of `spec` and serves commands until they end."""
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])  # before anything that reads it is loaded
    started = time.perf_counter()
    run = open_workload(find_peer(spec["peer"]), spec)
    say(replies, {"ready": os.getpid(), "open_seconds": time.perf_counter() - started})
    last: Decoded | float | None = None
    for line in commands:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            last = None  # freed before the clock starts
            wall, cpu = time.perf_counter(), time.process_time()
            last = run()
            spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            say(replies, spent | figures(last))
        elif command == "save" and isinstance(last, Decoded):
            save(last, Path(argument))
            say(replies, {"saved": argument})
        else:
            raise SystemExit(f"cannot do {line.strip()!r} now")


def open_workload(peer: Peer, spec: dict[str, Any]) -> Callable[[], Decoded | float]:
    """Loads the model and returns what `run` does."""
    import numpy as np

    directory, threads, precision = Path(spec["model"]), spec["threads"], spec["precision"]
    if spec["workload"] == "decoder":
        ids_S = np.load(spec["ids"], allow_pickle=False).astype(np.int64)
        decoder = peer.open_decoder(directory, threads, precision)
        return lambda: decoder.run(ids_S, spec["new_tokens"])
    assert spec["workload"] == "answer", spec["workload"]
    image = Path(spec["image"]).read_bytes()  # decoding it is part of an answer, the disk is not
    answers = peer.open_answer(directory, threads, precision, spec["keep"])
    return lambda: answers.run(image, spec["question"])


def figures(done: Decoded | float) -> dict[str, float]:
    """What one run adds to its reply."""
    if isinstance(done, Decoded):
        return {"prefill": done.prefill, "decode": done.decode}
    return {"first_token": done}


def save(done: Decoded, path: Path) -> None:
    """Writes tokens and logits as .npz."""
    import numpy as np

    arrays: dict[str, Any] = {"tokens": np.asarray(done.tokens, np.int64)}
    if done.logits is not None:
        arrays["logits"] = np.asarray(done.logits, np.float32)
    np.savez(path, allow_pickle=False, **arrays)


def main() -> None:
    """Converts a checkpoint, or serves until the commands end."""
    replies = own_stdout()
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    if spec["workload"] == "convert":
        peer = find_peer(spec["peer"])
        peer.convert(Path(spec["checkpoint"]), Path(spec["directory"]), spec["precision"])
    else:
        serve(spec, sys.stdin, replies)


if __name__ == "__main__":
    main()
