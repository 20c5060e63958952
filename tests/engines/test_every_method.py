"""Every kind of decision: plans for every generation of cards that TensorRT-RTX builds for here, and graphs
of nothing but what TensorRT 10.3 takes.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from method_decisions import LAYERS, MORE
from operator_list import refused
from shared_bundle import shared_bundle

from trimvlm.bundle import Bundle
from trimvlm_engines.build import build

CARDS = {"rtx-3090": "8.6", "rtx-4090": "8.9", "rtx-5090": "12.0"}


@pytest.fixture(scope="module")
def every(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with all of them, float32."""
    shared = shared_bundle(tmp_path_factory, MORE, LAYERS)
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("every") / "bundle"))


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="no TensorRT-RTX here")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", MORE)
def test_builds(every: Path, name: str, card: str) -> None:
    engine = build(every, card, name)
    assert engine.options["decoder"]["compute_capability"] == CARDS[card]
    roles = {"vision", "decoder"} | ({"projector"} if MORE[name].encoder else set())
    assert set(engine.graphs) == roles
    for role, file in engine.graphs.items():
        assert Bundle(every).path(file).stat().st_size == engine.measured[f"{role}_bytes"]


@pytest.mark.parametrize("name", MORE)
def test_tensorrt_10_3_knows_every_operator(every: Path, name: str) -> None:
    bundle = Bundle(every)
    _, entry = bundle.entry(name)
    for file in filter(None, (entry.decoders["primitive"], entry.vision, entry.projector)):
        assert refused(bundle.path(file)) == [], file
