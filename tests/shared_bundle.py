"""Bundles that tests in several files and processes read: exported once in a run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock
from tiny_models import tiny_bundle

from trimvlm.profile import Decisions


def shared_bundle(factory: pytest.TempPathFactory, decisions: Mapping[str, Decisions], layers: int) -> Path:
    """`tiny_bundle` of these; read only, tests that write make a copy."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own inside the run's
        root = root.parent
    key = hashlib.sha256(msgspec.json.encode([decisions, layers])).hexdigest()[:12]
    with FileLock(root / f"{key}.lock"):
        done = root / key / "done"
        if not done.exists():
            tiny_bundle(root / key, decisions, layers=layers)
            done.touch()
    return root / key / "bundle"
