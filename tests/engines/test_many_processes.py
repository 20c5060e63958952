"""Eight processes build one bundle at once and open it: all succeed, and each part is built once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from fake_library import two_profiles

from trimvlm.bundle import Bundle

PROCESSES = 8
TESTS = Path(__file__).parent.parent

# Started together: each waits for the file `go`, and prints what it built and what came of opening.
CHILD = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
from PIL import Image
from trimvlm import Session, machine
from trimvlm.binding import check_engine
from trimvlm.bundle import Bundle
from trimvlm_engines.build import build
bundle, target = Path(sys.argv[2]), sys.argv[3]
if target == "ort-cpu":
    import onnxruntime
else:
    import tensorrt_rtx
    machine.compute_capability = lambda: "8.9"  # as if the card were there; nothing is run on it
print("ready", flush=True)
while not (bundle.parent / "go").exists():
    time.sleep(0.01)
told, tokens = [], []
for profile in ("toy", "other"):
    engine = build(bundle, target, profile, tell=lambda *state: told.append(state))
    opened = Bundle(bundle)
    opened.verify()
    assert opened.manifest.profiles[profile].engines[target] == engine
    check_engine(opened, profile, engine)
    if target == "ort-cpu":
        image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
        with Session.open(bundle, profile, target, threads=1) as session:
            tokens.append("".join(session.generate("w7 w9", [image], max_new_tokens=4)))
print(json.dumps([[role for role, state in told if state == "built"], tokens]))
"""


@pytest.mark.parametrize("target", ["ort-cpu", "rtx-4090"])
def test_eight_processes_one_build(tmp_path: Path, target: str) -> None:
    pytest.importorskip("onnxruntime" if target == "ort-cpu" else "tensorrt_rtx")
    bundle = two_profiles(tmp_path / "bundle")
    command = [sys.executable, "-c", CHILD, str(TESTS), str(bundle), target]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, [problem for _, problem in said]
    found = [json.loads(text) for text, _ in said]
    # Two decoders and the vision graph that they share.
    assert Counter(role for built, _ in found for role in built) == {"vision": 1, "decoder": 2}
    answers = {tuple(tokens) for _, tokens in found}
    assert len(answers) == 1
    assert all(len(tokens) == (2 if target == "ort-cpu" else 0) and all(tokens) for tokens in answers)
    Bundle(bundle).verify()
    hidden = {path.name for path in bundle.rglob(".*")}
    assert hidden == {".manifest.lock", f".{target}.lock"}
