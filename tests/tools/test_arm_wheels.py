"""What a Jetson installs exists as wheels for Arm and JetPack's Pythons. Resolved, not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
# glibc of Ubuntu 22.04 is 2.35, so all of these can be installed there.
GLIBC = ("2_17", "2_24", "2_27", "2_28")


@pytest.mark.slow
@pytest.mark.parametrize(("python", "cuda"), [("3.10", "12"), ("3.12", "13")])
def test_dependencies_exist_for_a_jetson(python: str, cuda: str, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["ort"], *extras["tensorrt"], f"cuda-python=={cuda}.*"]
    platforms = [f"--platform=manylinux_{version}_aarch64" for version in GLIBC]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--retries=1"]
    command += [
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={python}",
        f"--target={tmp_path}",
    ]
    done = subprocess.run([*command, *platforms, *wanted], capture_output=True, text=True, check=False)
    if done.returncode and ("connection" in done.stderr.lower() or "Retrying" in done.stderr):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()[-1]
    assert found.startswith("Would install ")
    for name in ("numpy-", "msgspec-", "tokenizers-", "pillow-", "onnxruntime-", f"cuda-bindings-{cuda}."):
        assert f" {name}" in found
