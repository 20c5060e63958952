"""Hashes of large files are taken once, and again after anything that touches the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from trimvlm import files
from trimvlm.files import is_whole, record


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files that were hashed, in order. Everything is large, and old enough to be stamped."""
    taken: list[Path] = []
    sha256 = files.sha256

    def noted(path: Path) -> str:
        taken.append(path)
        return sha256(path)

    monkeypatch.setattr(files, "sha256", noted)
    monkeypatch.setattr(files, "SMALL", 3)
    monkeypatch.setattr(files, "SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    return taken


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_large_file_is_hashed_once(hashed: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path / "a", b"large")
    known = record(file)
    hashed.clear()
    assert is_whole(file, known) and is_whole(file, known)
    assert hashed == [file]
    assert is_whole(file, known, fresh=True)
    assert hashed == [file, file]


def test_a_small_file_is_hashed_every_time(hashed: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path / "a", b"abc")
    known = record(file)
    hashed.clear()
    assert is_whole(file, known) and is_whole(file, known)
    assert hashed == [file, file]


def test_a_change_is_noticed_even_if_its_time_is_set_back(hashed: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path / "a", b"large")
    known, before = record(file), file.stat()
    assert is_whole(file, known)
    time.sleep(0.02)  # more than the file system's clock tick
    file.write_bytes(b"larfe")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_whole(file, known)


def test_a_file_of_another_size_is_not_read(hashed: list[Path], tmp_path: Path) -> None:
    file = written(tmp_path / "a", b"large")
    known = record(file)
    hashed.clear()
    file.write_bytes(b"much larger")
    assert not is_whole(file, known)
    assert not is_whole(tmp_path / "b", known)
    assert hashed == []


def test_a_file_that_was_just_written_is_not_stamped(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within the resolution of its time stamp."""
    monkeypatch.setattr(files, "SETTLED", 60.0)
    file = written(tmp_path / "a", b"large")
    known = record(file)
    hashed.clear()
    assert is_whole(file, known) and is_whole(file, known)
    assert hashed == [file, file]


def test_without_a_writable_home_files_are_hashed_each_time(
    hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = written(tmp_path / "no-directory", b"")
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(blocked))
    file = written(tmp_path / "a", b"large")
    known = record(file)
    assert is_whole(file, known) and is_whole(file, known)
