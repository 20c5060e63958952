"""A profile's process: one answer per `run`, with the time of every step, in graphs and outside them.

Speaks the protocol of `worker.py`; imports what a device would.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trimvlm_tools.bench.clocked import Clocked, GraphRun, split
from trimvlm_tools.bench.worker import own_stdout, resident, say


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Opens the Session of `spec` (`bundle`, `profile`, `target`, `options`, `image`, `prompt`, `tokens`)."""
    import onnxruntime  # noqa: F401 - to know what it holds before any weights are there

    import trimvlm.session  # noqa: F401

    imports, started = resident(), time.perf_counter()
    runs: list[GraphRun] = []
    session = open_clocked(spec, runs)
    image = Path(spec["image"]).read_bytes()  # decoding it is part of preprocessing, the disk is not
    with session:
        opened = time.perf_counter() - started
        say(replies, {"ready": os.getpid(), "open_seconds": opened, "imports": imports})
        for line in commands:
            if line.strip() != "run":
                raise SystemExit(f"no command {line.strip()!r}")
            runs.clear()
            cpu, start = time.process_time(), time.perf_counter()
            for _ in session.generate(spec["prompt"], [image], max_new_tokens=spec["tokens"]):
                pass
            end, cpu = time.perf_counter(), time.process_time() - cpu
            timings, parts = session.timings, split(runs, start, end)
            reply = {
                "seconds": end - start,
                "cpu_seconds": cpu,
                "preprocess": timings.preprocess,
                "vision": timings.vision,
                "select": timings.select,
                "prefill": timings.prefill,
                "first_token": parts["first_graph"] + parts["first_host"],
                "decode_tokens": timings.decode_tokens,
                **parts,
            }
            say(replies, {name: value for name, value in reply.items() if value is not None})


def open_clocked(spec: dict[str, Any], runs: list[GraphRun]) -> Any:
    """A Session as `Session.open` makes it, whose graphs are clocked.

    Raises:
        UserError: as `Session.open`.
    """
    from trimvlm.bundle import Bundle
    from trimvlm.opening import check_opening, open_backends
    from trimvlm.runner import Runner
    from trimvlm.session import Session
    from trimvlm.text import load_tokenizer

    bundle, target = Bundle(spec["bundle"]), spec["target"]
    names = bundle.named(spec["profile"])
    check_opening(bundle, names, target)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.text.tokenizer))
    runners = []
    for name in names:
        backends = open_backends(bundle, name, target, spec["options"], shared=len(names) > 1)
        clocked = {member: Clocked(backend, runs) for member, backend in backends.items()}
        runners.append(Runner(bundle, name, clocked, tokenizer))
    return Session(bundle, spec["profile"], target, runners, tokenizer)


def main() -> None:
    """Serves until the commands end."""
    replies = own_stdout()
    serve(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
