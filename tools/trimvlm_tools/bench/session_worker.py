"""A profile's process for `trimvlm bench BUNDLE`: one answer per `run`, with the time of every step.

Speaks the protocol of `worker.py`; imports what a device would.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from trimvlm_tools.bench.worker import own_stdout, say


def serve(spec: dict[str, Any], commands: Any, replies: Any) -> None:
    """Opens the Session of `spec` (`bundle`, `profile`, `target`, `threads`, `image`, `prompt`, `tokens`)."""
    from trimvlm.session import Session

    started = time.perf_counter()
    session = Session.open(spec["bundle"], spec["profile"], spec["target"], **spec["options"])
    image = Path(spec["image"]).read_bytes()  # decoding it is part of preprocessing, the disk is not
    with session:
        say(replies, {"ready": os.getpid(), "open_seconds": time.perf_counter() - started})
        for line in commands:
            if line.strip() != "run":
                raise SystemExit(f"no command {line.strip()!r}")
            cpu = time.process_time()
            for _ in session.generate(spec["prompt"], [image], max_new_tokens=spec["tokens"]):
                pass
            cpu = time.process_time() - cpu
            timings = session.timings
            reply = {
                "seconds": timings.first_token + timings.decode,
                "cpu_seconds": cpu,
                "preprocess": timings.preprocess,
                "vision": timings.vision,
                "select": timings.select,
                "prefill": timings.prefill,
                "first_token": timings.first_token,
                "decode_tokens": timings.decode_tokens,
                "tokens_per_second": timings.tokens_per_second,
            }
            say(replies, {name: value for name, value in reply.items() if value is not None})


def main() -> None:
    """See `worker.main`."""
    replies = own_stdout()
    serve(json.loads(Path(sys.argv[1]).read_text()), sys.stdin, replies)


if __name__ == "__main__":
    main()
