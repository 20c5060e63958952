"""Longer rows, against the graph without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from decoder_feeds import prefill_feeds
from PIL import Image
from safetensors.numpy import load_file, save_file

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_engines.matrices import gemm_weights
from trimvlm_engines.padding import COLUMNS, pad


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 128 bytes: rows of 32 values, as small models have them."""
    monkeypatch.setattr("trimvlm_engines.padding.PAGE", 128)


@pytest.mark.parametrize("method", ["dense", "hidivdrop"])
@pytest.mark.usefixtures("small_pages")
def test_graphs_agree(bundle: Path, method: str) -> None:
    opened = Bundle(bundle)
    _, entry = opened.entry(method)
    graph = bundle / entry.decoders["fused"]
    model = onnx.load(str(graph), load_external_data=False)
    store = pad(model, opened)
    assert store
    with (bundle / store.name).open("wb") as sink:
        store.write(sink.write, bundle)
    longer = bundle / "longer.onnx"
    longer.write_bytes(model.SerializeToString())
    feeds = prefill_feeds(Schedule.resolve(opened.profile(method), entry.model), text=6, before_image=2)
    plain, other = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)
        for path in (graph, longer)
    )
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("small_pages")
def test_only_rows_of_whole_pages_get_zeros(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Pad for each value that such products read, one for several that read the same."""
    opened = Bundle(bundle)
    _, entry = opened.entry("dense")
    model = onnx.load(str(opened.path(entry.decoders["fused"])), load_external_data=False)
    matrices = {each.name: each for each in gemm_weights(model)}
    widths = {each.width for each in matrices.values()}
    assert len(widths) > 1, "of the layers' width and of the feed forward network's"
    monkeypatch.setattr("trimvlm_engines.padding.PAGE", 4 * max(widths))
    read = {
        node.input[0]
        for node in model.graph.node
        if node.op_type == "Gemm" and matrices[node.input[1]].width == max(widths)
    }
    store = pad(model, opened)
    assert store
    with (bundle / store.name).open("wb") as sink:
        store.write(sink.write, bundle)
    stored = load_file(bundle / store.name)
    assert {*stored} == {name for name, each in matrices.items() if each.width == max(widths)}
    for name, padded in stored.items():
        assert np.array_equal(padded[:, :-COLUMNS], np.concatenate([*matrices[name].parts(bundle)]))
        assert not padded[:, -COLUMNS:].any()
    pads = [node for node in model.graph.node if node.op_type == "Pad"]
    assert {node.input[0] for node in pads} == read and len(pads) == len(read)


@pytest.mark.usefixtures("small_pages")
def test_a_built_profile_answers_as_without(bundle: Path) -> None:
    """Profiles share the files of matrices; one that is damaged is found, and made again."""
    for name in ("dense", "hidivdrop"):
        build(bundle, "ort-cpu-padded", name)
    files = sorted(bundle.glob("weights.padded.*"))
    assert len(files) == 2, "the decoders' and the tower's"
    logits = {}
    for target in ("ort-cpu", "ort-cpu-padded"):
        with Session.open(bundle, "hidivdrop", target) as session:
            prompt = session.prompt("where is w1 ?", 1)
            pixels = np.random.default_rng(3).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            visual = session.visual([Image.fromarray(pixels)])
            logits[target] = session.prefill(prompt, visual.rows)["logits"][0]
    np.testing.assert_allclose(logits["ort-cpu"], logits["ort-cpu-padded"], atol=1e-5)
    whole = files[0].read_bytes()
    tensors = load_file(files[0])
    next(iter(tensors.values()))[0, 0] += 1
    save_file(tensors, files[0])
    with pytest.raises(UserError, match=r"weights\.padded"):
        Session.open(bundle, "dense", "ort-cpu-padded")
    build(bundle, "ort-cpu-padded", "dense")
    assert files[0].read_bytes() == whole


def test_what_has_no_such_rows_is_refused(bundle: Path, contents: Callable[[], dict[str, bytes]]) -> None:
    before = contents()
    with pytest.raises(UserError, match="no float32 matrix of this model has rows of whole pages"):
        build(bundle, "ort-cpu-padded", "dense")
    assert contents() == before


def test_where_it_has_no_use_it_is_refused() -> None:
    assert targets.load("ort-cpu-padded").padded
    with pytest.raises(UserError, match="padded: only ONNX Runtime's CPU provider"):
        targets.load("rtx-4090-padded")
    with pytest.raises(UserError, match="no target 'ort-cpu-int4-padded'"):
        targets.load("ort-cpu-int4-padded")
