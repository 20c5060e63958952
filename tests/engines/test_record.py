"""Killed builds, parallel builds, lost plans: the bundle stays whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimvlm.bundle import Bundle, Engine
from trimvlm.bundle import record as bundle_record
from trimvlm.errors import UserError
from trimvlm_engines import record
from trimvlm_engines.build import build

Contents = Callable[[], dict[str, bytes]]

ADD_ENGINES = """
import sys
from pathlib import Path
from trimvlm.bundle import Engine
from trimvlm_engines import record
for number in range(25):
    target = f"{sys.argv[2]}-{number}"
    engine = Engine(target=target, backend="none", version="0", graphs={}, profile_digest="")
    record.add_engine(Path(sys.argv[1]), "dense", engine, [])
"""

KILLED_WHILE_WRITING = """
import os, signal, sys
from trimvlm_engines import record
from trimvlm_engines.build import build
write = record.PlanFile.write
def half(self, data):
    write(self, data[: len(data) // 2])
    self._file.flush()
    if "decoder" in self.path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data[len(data) // 2 :])
record.PlanFile.write = half
build(sys.argv[1], "rtx-4090", "dense")
"""


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def test_parallel_changes_lose_no_entry(bundle: Path) -> None:
    processes = [python(ADD_ENGINES, bundle, name) for name in ("a", "b", "c")]
    for process in processes:
        assert process.wait() == 0, process.communicate()[1]
    wanted = {f"{name}-{number}" for name in "abc" for number in range(25)}
    assert set(Bundle(bundle).manifest.profiles["dense"].engines) == wanted


def test_parallel_builds_into_one_bundle(bundle: Path) -> None:
    code = "import sys; from trimvlm_engines.build import build; build(sys.argv[1], 'ort-cpu', sys.argv[2])"
    processes = [python(code, bundle, profile) for profile in ("dense", "fastv", "vtw")]
    for process in processes:
        assert process.wait() == 0, process.communicate()[1]
    entries = Bundle(bundle).manifest.profiles
    assert {name for name, entry in entries.items() if "ort-cpu" in entry.engines} == {
        "dense",
        "fastv",
        "vtw",
    }


def test_killed_build_leaves_the_bundle_as_it_was(bundle: Path, contents: Contents) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = contents()
    process = python(KILLED_WHILE_WRITING, bundle)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    after = contents()
    left = {name for name in after if name not in before}
    assert left == {".vision.rtx-4090.engine.part", ".dense.rtx-4090.decoder.engine.part"}
    assert {name: data for name, data in after.items() if name not in left} == before
    Bundle(bundle).verify()

    build(bundle, "rtx-4090", "dense")
    assert {name for name in contents() if name not in before} == {
        "vision.rtx-4090.engine",
        "dense.rtx-4090.decoder.engine",
    }
    Bundle(bundle).verify()


def test_failed_plan_is_removed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), record.PlanFile(tmp_path / "a.engine") as plan:
        plan.write(b"half")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


def test_plan_has_no_name_before_it_is_published(tmp_path: Path) -> None:
    with record.PlanFile(tmp_path / "a.engine") as plan:
        plan.write(b"whole")
    assert not (tmp_path / "a.engine").exists()
    file = plan.move(tmp_path)
    assert (tmp_path / "a.engine").read_bytes() == b"whole"
    assert file == bundle_record(tmp_path / "a.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["a.engine"]


def with_plan(bundle: Path) -> Path:
    """Adds an engine with a plan of a few bytes."""
    with record.PlanFile(bundle / "dense.card.decoder.engine") as plan:
        plan.write(b"plan")
    graphs = {"decoder": "dense.card.decoder.engine"}
    engine = Engine(target="card", backend="none", version="0", graphs=graphs, profile_digest="")
    record.add_engine(bundle, "dense", engine, [plan])
    return bundle / "dense.card.decoder.engine"


@pytest.mark.parametrize("damage", [b"pl", None], ids=["cut short", "deleted"])
def test_lost_plan_is_forgotten_and_nothing_else(bundle: Path, damage: bytes | None) -> None:
    build(bundle, "ort-cpu", "dense")
    plan = with_plan(bundle)
    assert set(record.open_bundle(bundle).manifest.profiles["dense"].engines) == {"card", "ort-cpu"}
    plan.unlink() if damage is None else plan.write_bytes(damage)
    opened = record.open_bundle(bundle)
    assert set(opened.manifest.profiles["dense"].engines) == {"ort-cpu"}
    assert plan.name not in opened.manifest.files


def test_lost_weights_stay_an_error(bundle: Path) -> None:
    (bundle / Bundle(bundle).manifest.weights[0]).unlink()
    with pytest.raises(UserError, match="is missing; copy the bundle again, or export to"):
        record.open_bundle(bundle)


def test_profile_that_went_away_during_the_build(bundle: Path) -> None:
    engine = Engine(target="card", backend="none", version="0", graphs={}, profile_digest="")
    with pytest.raises(UserError, match="profile gone was removed during the build"):
        record.add_engine(bundle, "gone", engine, [])
