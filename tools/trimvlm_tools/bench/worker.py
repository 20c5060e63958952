"""A contender's process: holds one ONNX Runtime session and runs it when told. `python -m ... SPEC.json`.

Protocol, one JSON object per line. On stdout: `{"ready": ...}` once the session is open, then one reply per
command. On stdin: `run` (reply: `{"seconds", "cpu_seconds"}`), `save FILE` (the last run's outputs as .npz),
end of file to leave. Whatever else the process prints goes to stderr.

Only numpy and ONNX Runtime are imported, so that a worker's memory is the session's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

# Worker threads spin between the operators of one run, as in production, but not after it: contenders take
# turns on the same cores.
OPTIONS = {"session.force_spinning_stop": "1"}


def open_session(graph: str, threads: int, options: dict[str, str]) -> Any:
    """An ONNX Runtime session on the CPU with `threads` intra-op threads."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    for key, value in {**OPTIONS, **options}.items():
        settings.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Opens the session of `spec` (`graph`, `feeds`, `threads`, `options`) and serves commands."""
    import numpy as np
    import onnxruntime

    started = time.perf_counter()
    session = open_session(spec["graph"], spec["threads"], spec.get("options", {}))
    opened = time.perf_counter() - started
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    with np.load(spec["feeds"]) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if wanted != set(arrays):
        raise SystemExit(
            f"{spec['graph']}: inputs {sorted(wanted ^ set(arrays))} are fed or wanted, not both"
        )
    # OrtValues both ways: no copy of inputs or outputs is timed, for any contender.
    feeds = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    say(replies, {"ready": os.getpid(), "open_seconds": opened})
    outputs: list[Any] = []
    for line in commands:
        command, _, argument = line.strip().partition(" ")
        if command == "run":
            outputs = []  # freed before the clock starts: the arena reuses the buffers
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = session.run_with_ort_values(names, feeds)
            say(
                replies,
                {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu},
            )
        elif command == "save":
            np.savez(argument, **{n: o.numpy() for n, o in zip(names, outputs, strict=True)})
            say(replies, {"saved": argument})
        else:
            raise SystemExit(f"no command {command!r}")


def say(replies: Any, message: dict[str, Any]) -> None:
    """One reply."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def own_stdout() -> TextIO:
    """The protocol's stdout; whatever else is printed goes to stderr from here on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def main() -> None:
    """Serves until the commands end."""
    replies = own_stdout()
    serve(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
