"""Bundles to build in, exported once: every method's decoder on a tiny random LLaVA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import tiny_bundle

from trimvlm.profile import Decisions, LayerRule, Select
from trimvlm.rules import LastRowAttention

LAYERS, TOKENS = 5, 16

_LATE = LayerRule(layers=(3, 4), query="none")
_FASTV = Select(layer=2, keep=TOKENS // 2, by=LastRowAttention(attention="previous"))
_OWN = LastRowAttention(attention="own")

METHODS = {
    "dense": Decisions(),
    "v-skip": Decisions(layers=(_LATE,)),
    "fastv": Decisions(select=(_FASTV,)),
    "vtw": Decisions(exit=3),
    "shortv": Decisions(layers=(LayerRule(layers=(3, 4), query="none", ffn="none"),)),
    "hidivdrop": Decisions(
        inject=1, exit=4, select=(Select(layer=2, keep=8, by=_OWN), Select(layer=3, keep=3, by=_OWN))
    ),
    "fastv+v-skip": Decisions(select=(_FASTV,), layers=(_LATE,)),
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with every method, float32. Read only: tests that write take `bundle`."""
    return tiny_bundle(tmp_path_factory.mktemp("engines"), METHODS, layers=LAYERS)


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
