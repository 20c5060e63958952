"""Bundles to build in, exported once: every method's decoder on a tiny random LLaVA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from method_decisions import LAYERS, METHODS
from shared_bundle import shared_bundle


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every method, float32. Read only: tests that write take `bundle`."""
    return shared_bundle(tmp_path_factory, METHODS, LAYERS)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle of its own for each test."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


@pytest.fixture
def contents(bundle: Path) -> Callable[[], dict[str, bytes]]:
    """What the bundle holds now, but for lock files: name to bytes."""
    return lambda: {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }
