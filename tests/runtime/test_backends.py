"""The ONNX Runtime backend by itself."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
from toy_bundle import write_toy_bundle

from trimvlm.backends import Port, load_backend


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    out = write_toy_bundle(tmp_path / "bundle", dtype="float16")
    return {"vision": out / "vision.onnx", "decoder": out / "toy.decoder.fused.onnx"}


def test_ports_come_from_the_graph(files: dict[str, Path]):
    with load_backend("onnxruntime", files, {}) as backend:
        inputs = backend.inputs("decoder")
        assert inputs["past_key.2"] == Port(np.dtype(np.float16), (1, 1, None, 1))
        assert inputs["input_ids"] == Port(np.dtype(np.int64), (None,))
        assert backend.outputs("decoder")["logits"] == Port(np.dtype(np.float32), (1, 64))
        assert [name for name in inputs if name.startswith("past_key")] == ["past_key.0", "past_key.2"]


def test_kept_outputs_feed_the_next_run(files: dict[str, Path]):
    with load_backend("onnxruntime", files, {}) as backend:
        empty = {
            name: np.zeros([size or 0 for size in port.shape], port.dtype)
            for name, port in backend.inputs("decoder").items()
        }
        text = {"input_ids": np.array([3, 4]), "text_positions": np.array([0, 1])}
        kept = [name for name in backend.outputs("decoder") if name.startswith("present")]
        first = backend.run("decoder", {**empty, **text}, ["logits"], kept)
        assert sorted(first) == sorted(["logits", *kept])
        assert not isinstance(first["present_key.0"], np.ndarray)
        past = {name.replace("present", "past"): first[name] for name in kept}
        second = backend.run("decoder", {**empty, **text, **past}, ["present_key.0"])
        assert second["present_key.0"].ravel().tolist() == [3, 4, 3, 4]


def test_arrays_that_do_not_fit_are_named(files: dict[str, Path]):
    pixels = np.zeros((1, 3, 4, 4), np.float16)
    with load_backend("onnxruntime", files, {}) as backend:
        backend.run("vision", {"pixel_values": pixels}, ["visual"])
        backend.run("vision", {"pixel_values": pixels.transpose(0, 1, 3, 2)}, ["visual"])
        for bad in (pixels.astype(np.float32), pixels[0], pixels[..., :3]):
            with pytest.raises(AssertionError, match="pixel_values"):
                backend.run("vision", {"pixel_values": bad}, ["visual"])
        with pytest.raises(AssertionError, match="pixels is no input"):
            backend.run("vision", {"pixels": pixels}, ["visual"])


def test_views_are_read_as_what_they_show(files: dict[str, Path]):
    """ONNX Runtime reads the memory behind an array; it must notice that a view is strided."""
    pixels = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float16)
    view = pixels.transpose(0, 1, 3, 2)
    with load_backend("onnxruntime", files, {}) as backend:
        (seen,) = backend.run("vision", {"pixel_values": view}, ["visual"]).values()
        (want,) = backend.run("vision", {"pixel_values": view.copy()}, ["visual"]).values()
        np.testing.assert_array_equal(seen, want)


def test_memory_is_held_only_inside_with(files: dict[str, Path]):
    backend = load_backend("onnxruntime", files, {})
    assert not backend.sessions
    with backend:
        held = [weakref.ref(session) for session in backend.sessions.values()]
        assert len(held) == 2
    gc.collect()
    assert [reference() for reference in held] == [None, None]
