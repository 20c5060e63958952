"""A change of a bundle that is killed at any of its steps: seen whole or not at all, and finished later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from toy_bundle import write_toy_bundle

from trimvlm import bundle as bundle_module
from trimvlm.bundle import MANIFEST, PENDING, Bundle, record, write_manifest
from trimvlm.errors import UserError
from trimvlm.manifest import read_manifest
from trimvlm.publishing import STAGED, changing, publish

# Dies before the step of that number: every step is a rename.
CHANGE = """
import os, signal, sys
from pathlib import Path
import msgspec
from trimvlm.bundle import record
from trimvlm.manifest import read_manifest
from trimvlm.publishing import STAGED, changing, publish
directory, last, steps = Path(sys.argv[1]), int(sys.argv[2]), 0

def counted(rename):
    def step(*arguments):
        global steps
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return rename(*arguments)
    return step

for name in ("replace", "rename"):
    setattr(Path, name, counted(getattr(Path, name)))
with changing(directory):
    before = read_manifest(directory)
    staged = directory / f"{STAGED}test"
    (staged / "new").mkdir(parents=True)
    (staged / "new/file").write_bytes(b"new")
    (staged / "vision.onnx").write_bytes((directory / "vision.onnx").read_bytes() + b"x")
    files = {name: record(staged / name) for name in ("new/file", "vision.onnx")}
    publish(directory, staged, msgspec.structs.replace(before, files={**before.files, **files}))
print(steps)
"""


def change(directory: Path, last: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHANGE, str(directory), str(last)], capture_output=True, text=True, check=False
    )


def test_killed_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "PATIENCE", 0.1)
    whole = write_toy_bundle(tmp_path / "whole")
    before = read_manifest(whole)
    done = change(whole, -1)
    assert done.returncode == 0, done.stderr
    after = Bundle(whole).manifest
    seen = []
    for last in range(int(done.stdout)):
        directory = write_toy_bundle(tmp_path / str(last))
        assert change(directory, last).returncode < 0
        try:
            opened = Bundle(directory)
            opened.verify()
            seen.append("before" if opened.manifest == before else "after")
            assert opened.manifest in (before, after)
        except UserError as error:
            seen.append("refused")
            assert f"finish it with trimvlm verify {directory}" in str(error)
        pending = (directory / PENDING).exists()
        with changing(directory):
            assert not (directory / PENDING).exists()
            assert not list(directory.glob(f"{STAGED}*"))
        assert Bundle(directory).manifest == (after if pending else before)
        Bundle(directory).verify()
    assert seen[0] == "before" and "refused" in seen


def test_a_reader_waits_for_a_change_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are in place, the manifest is not: the reader looks again, and finds it."""
    directory = write_toy_bundle(tmp_path / "bundle")
    manifest = read_manifest(directory)
    (directory / PENDING).mkdir()
    (directory / "new.onnx").write_bytes(b"new")
    files = {**manifest.files, "new.onnx": record(directory / "new.onnx")}
    waited = []

    def arrives(seconds: float) -> None:
        waited.append(seconds)
        write_manifest(directory, msgspec.structs.replace(manifest, files=files))
        (directory / PENDING).rmdir()

    monkeypatch.setattr(bundle_module.time, "sleep", arrives)
    assert "new.onnx" in Bundle(directory).manifest.files
    assert len(waited) == 1


def test_readers_never_see_half_a_change(tmp_path: Path) -> None:
    """Opens while a writer changes the bundle a hundred times."""
    directory = write_toy_bundle(tmp_path / "bundle")
    writer = os.fork()
    if not writer:
        try:
            for number in range(100):
                with changing(directory):
                    manifest = read_manifest(directory)
                    staged = directory / f"{STAGED}test"
                    staged.mkdir()
                    (staged / "plan").write_bytes(os.urandom(10 + number))
                    files = {**manifest.files, "plan": record(staged / "plan")}
                    publish(directory, staged, msgspec.structs.replace(manifest, files=files))
        finally:
            os._exit(0)
    sizes = set()
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        file = Bundle(directory).manifest.files.get("plan")
        sizes.add(file and file.bytes)
    assert len(sizes) > 1
    assert Bundle(directory).manifest.files["plan"].bytes == 109


def test_a_manifest_changed_by_hand_is_refused(tmp_path: Path) -> None:
    directory = write_toy_bundle(tmp_path / "bundle")
    path = directory / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"producer": "test"', '"producer": "me"'))
    with pytest.raises(UserError, match="changed since it was written"):
        Bundle(directory)
    path.write_text(json.dumps(json.loads(text)))
    with pytest.raises(UserError, match="not a bundle manifest of format 3, or damaged at its beginning"):
        Bundle(directory)


def test_a_file_that_begins_as_folders_do_is_left_alone(tmp_path: Path) -> None:
    """A build writes `.<profile>.<target>...part` beside them, and a profile may be called `staged`."""
    directory = write_toy_bundle(tmp_path / "bundle")
    part = directory / f"{STAGED}some-target.decoder.onnx.part"
    part.write_bytes(b"half")
    (directory / f"{STAGED}killed").mkdir()
    with changing(directory):
        assert part.read_bytes() == b"half"
        assert not (directory / f"{STAGED}killed").exists()
