"""What `import trimvlm` loads: nothing that a device does not have."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import trimvlm

FORBIDDEN = {
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "yaml",
    "rich",
    "matplotlib",
    "jinja2",
    "safetensors",
}
HEAVY = {"numpy", "PIL", "tokenizers", "onnxruntime", "msgspec"}


def loaded(statement: str) -> tuple[set[str], float]:
    code = (
        "import json, sys, time; start = time.perf_counter(); before = set(sys.modules)\n"
        f"{statement}\n"
        "names = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps([sorted(names), time.perf_counter() - start]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, seconds = json.loads(run.stdout)
    return set(names), seconds


def test_importing_loads_nothing_heavy(record_property):
    names, seconds = loaded("import trimvlm")
    record_property("seconds", seconds)
    print(f"import trimvlm: {seconds:.3f} s")
    assert "trimvlm" in names
    assert not names & (FORBIDDEN | HEAVY)


def test_a_session_loads_none_of_the_workstations_libraries():
    names, _ = loaded("import trimvlm; trimvlm.Session, trimvlm.Bundle, trimvlm.Profile, trimvlm.Target")
    assert {"numpy", "PIL", "msgspec"} <= names
    assert not names & FORBIDDEN
    assert "onnxruntime" not in names


def test_every_public_name_is_there():
    for name in trimvlm.__all__:
        assert getattr(trimvlm, name) is not None
    assert set(trimvlm._MODULES) | {"__version__"} == set(trimvlm.__all__)
    assert not hasattr(trimvlm, "Engine2")


def test_the_version_is_the_distributions():
    assert trimvlm.__version__ == importlib.metadata.version("trimvlm")
