"""Decoders in blocks of layers and vocabularies in pieces, from the build to the answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from tiny_models import noise_image

from trimvlm.backends.blocks import Blocks
from trimvlm.binding import check_engine
from trimvlm.bundle import Bundle, Engine, record, write_manifest
from trimvlm.errors import UserError
from trimvlm.session import Session
from trimvlm.target import Limits, Target, Weights
from trimvlm_engines import targets
from trimvlm_engines.build import build

Contents = Callable[[], dict[str, bytes]]
ROLES = ["vision", "decoder.0", "decoder.1", "decoder.2"]
QUESTION = "what is w3 ?"


def small(of: str = "ort-cpu", **limits: int) -> Target:
    """A target that takes two layers at a time and 24 vocabulary entries."""
    wanted = Limits(**{"lm_head_columns": 24, "layers_per_engine": 2, **limits})
    return msgspec.structs.replace(targets.load(of), name="small", limits=wanted)


def answer(bundle: Path, profile: str, target: str) -> list[str]:
    with Session.open(bundle, profile, target, threads=1) as session:
        return list(session.generate(QUESTION, [noise_image(1)], max_new_tokens=6))


@pytest.mark.parametrize("method", ["dense", "v-skip", "fastv", "vtw", "shortv", "hidivdrop", "fastv+v-skip"])
def test_blocks_answer_as_the_whole(bundle: Path, method: str) -> None:
    engine = build(bundle, small(), method)
    assert list(engine.graphs) == ROLES
    assert engine.graphs["decoder.1"] == f"{method}.small.decoder.1.onnx"
    split = {"lm_head_columns": 24, "layers_per_engine": 2, "blocks": 3}
    assert engine.options["decoder.1"]["split"] == split
    Bundle(bundle).verify()
    assert answer(bundle, method, "small") == answer(bundle, method, "ort-cpu")


def test_quantised_blocks_answer_as_the_quantised_whole(bundle: Path) -> None:
    weights = Weights(bits=8)
    build(bundle, msgspec.structs.replace(small(), weights=weights), "hidivdrop")
    whole = msgspec.structs.replace(targets.load("ort-cpu"), name="whole", weights=weights)
    build(bundle, whole, "hidivdrop")
    assert answer(bundle, "hidivdrop", "small") == answer(bundle, "hidivdrop", "whole")


def test_a_session_of_blocks_gives_every_output(bundle: Path) -> None:
    build(bundle, small(), "hidivdrop")
    found = {}
    for target in ("small", "ort-cpu"):
        with Session.open(bundle, "hidivdrop", target, threads=1) as session:
            prompt = session.prompt(QUESTION, 1)
            visual = session.vision([noise_image(1)])
            first = session.prefill(prompt, visual)
            second = session.step(int(first["logits"].argmax()), first)
            found[target] = (first, second)
            blocks = session._runner.backends["hidivdrop"]
            assert isinstance(blocks, Blocks) == (target == "small")
    for split, whole in zip(found["small"], found["ort-cpu"], strict=True):
        assert split.keys() == whole.keys()
        for name in whole:  # queries are scaled before attention there and scores in it here
            np.testing.assert_allclose(split[name], whole[name], atol=1e-5, err_msg=name)


def test_second_build_is_skipped_and_other_limits_are_not(bundle: Path, contents: Contents) -> None:
    build(bundle, small(), "dense")
    before = contents()
    told: list[tuple[str, str]] = []
    build(bundle, small(), "dense", tell=lambda *pair: told.append(pair))
    assert told == [(role, "up to date") for role in ROLES]
    assert contents() == before
    told.clear()
    engine = build(bundle, small(layers_per_engine=3), "dense", tell=lambda *pair: told.append(pair))
    assert list(engine.graphs) == ROLES[:-1]
    assert [role for role, state in told if state == "built"] == ROLES[1:-1]
    assert len(answer(bundle, "dense", "small")) > 0


def test_vocabulary_alone_is_split_too(bundle: Path) -> None:
    limits = Limits(lm_head_columns=24)
    engine = build(bundle, msgspec.structs.replace(small(), limits=limits), "dense")
    assert engine.graphs == {"vision": "vision.onnx", "decoder": "dense.small.decoder.onnx"}
    assert answer(bundle, "dense", "small") == answer(bundle, "dense", "ort-cpu")


@pytest.mark.parametrize("damage", ["deleted", "changed"])
def test_block_that_is_lost_is_named_and_made_again(bundle: Path, damage: str) -> None:
    build(bundle, small(), "dense")
    block = bundle / "dense.small.decoder.1.onnx"
    data = block.read_bytes()
    block.unlink()
    if damage == "changed":
        block.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = re.escape(f"trimvlm build {bundle} --target small --profile dense")
    with pytest.raises(UserError, match=rf"dense\.small\.decoder\.1\.onnx .*; build it again with {said}"):
        Session.open(bundle, "dense", "small")
    told: list[tuple[str, str]] = []
    build(bundle, small(), "dense", tell=lambda *pair: told.append(pair))
    assert ("decoder.1", "built") in told
    assert block.read_bytes() == data


def test_engine_that_lacks_a_block_does_not_fit(bundle: Path) -> None:
    engine = build(bundle, small(), "dense")

    def check(changed: Engine) -> None:
        check_engine(Bundle(bundle), "dense", changed)

    check(engine)
    graphs = {role: file for role, file in engine.graphs.items() if role != "decoder.2"}
    with pytest.raises(UserError, match=r"the list of its parts is .*decoder\.1, .*decoder\.2"):
        check(msgspec.structs.replace(engine, graphs=graphs))
    swapped = {**engine.graphs, "decoder.1": engine.graphs["decoder.2"]}
    with pytest.raises(UserError, match=r"the hash of dense\.small\.decoder\.2\.onnx is"):
        check(msgspec.structs.replace(engine, graphs=swapped))


def test_failed_build_leaves_nothing(bundle: Path, contents: Contents) -> None:
    """The first block is made by then."""
    graph = bundle / "dense.decoder.fused.onnx"
    model = onnx.load(graph, load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == "Attention"][-1]
    node.op_type = "Atention"
    manifest = Bundle(bundle).manifest
    graph.write_bytes(model.SerializeToString())
    files = {**manifest.files, graph.name: record(graph)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    before = contents()
    with pytest.raises(UserError, match=r"dense\.small\.decoder\.2\.onnx.* cannot load this graph"):
        build(bundle, small(), "dense")
    assert contents() == before


@pytest.mark.parametrize("lowering", ["fused", "primitive"])
def test_tensorrt_rtx_builds_them(bundle: Path, lowering: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    target = msgspec.structs.replace(small("rtx-4090", layers_per_engine=3), lowering=lowering)
    engine = build(bundle, target, "hidivdrop")
    assert {role: Path(file).suffix for role, file in engine.graphs.items()} == dict.fromkeys(
        ("vision", "decoder.0", "decoder.1"), ".engine"
    )
    opened = Bundle(bundle)
    opened.verify()
    ranges = engine.options["decoder.1"]["ranges"]
    carried = [name for name in ranges if name.startswith("carried.")]
    assert carried and all(
        low <= high for name in carried for low, _, high in zip(*ranges[name], strict=True)
    )
    for role in ("decoder.0", "decoder.1"):
        assert opened.path(engine.graphs[role]).stat().st_size == engine.measured[f"{role}_bytes"]
        assert engine.options[role]["piece"] == f"hidivdrop.small.{role}.onnx"
    before = {role: engine.options[role]["plan"] for role in engine.graphs}
    again = build(bundle, target, "hidivdrop")
    assert {role: again.options[role]["plan"] for role in again.graphs} == before


@pytest.mark.parametrize("field", ["lm_head_columns", "layers_per_engine"])
def test_onnx_that_is_missing_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents, field: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    before = contents()
    target = msgspec.structs.replace(small(), limits=Limits(**{field: 2}))
    with pytest.raises(UserError, match="need the package onnx; pip install onnx"):
        build(bundle, target, "dense")
    assert contents() == before
