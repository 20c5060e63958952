"""What a user reads where plans cannot run: the value, what is allowed, the next step, on one line."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from tensorrt_standin import StandIn
from tensorrt_standin.cudart import cudaError_t
from tensorrt_standin.engine import Context
from tensorrt_standin.plans import write_plan
from toy_bundle import toy_pixels, write_toy_bundle

from trimvlm import Session, UserError, machine
from trimvlm.backends import load_backend
from trimvlm.backends.shape_ranges import Range, choose
from trimvlm.target import Limits
from trimvlm_engines import targets
from trimvlm_engines.build import build

CARD, BOARD = "rtx-4090", "jetson-orin-nano-8gb-jp7"
LIMITS = Limits(images=1, text=8, new_tokens=52)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """Nothing may be left on it, whatever failed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    made = StandIn(monkeypatch)
    yield made
    gc.collect()  # a traceback refers to the frames that it went through
    made.device.assert_clean()


@pytest.fixture
def bundle(standin: StandIn, tmp_path: Path) -> Path:
    """Built for both flavours."""
    bundle = write_toy_bundle(tmp_path / "bundle", eos=())
    for name in (CARD, BOARD):
        target = msgspec.structs.replace(targets.load(name), limits=LIMITS, compute_capability="8.9")
        build(bundle, target)
    return bundle


def message(bundle: Path, target: str = CARD, **options: Any) -> str:
    """What opening and entering a session says, or one answer to a question with an image."""
    with pytest.raises(UserError) as caught, Session.open(bundle, target=target, **options) as session:
        rows = session.vision([toy_pixels(1)])
        session.prefill(session.prompt("w20", 1), rows)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_the_library_is_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert message(bundle) == (
        "tensorrt_rtx is not installed; pip install 'trimvlm[rtx]' (x86-64 Linux or Windows)"
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    said = message(bundle, BOARD)
    assert "comes with JetPack 6.1 or newer" in said and "--system-site-packages" in said


def test_the_library_does_not_load(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    assert machine.library_version("tensorrt") is None
    said = message(bundle, BOARD)
    assert said.startswith(
        "tensorrt is installed, but does not load (libnvinfer.so.10: cannot open); TensorRT"
    )


def test_the_library_is_too_old(standin: StandIn, tmp_path: Path) -> None:
    for name, old, wanted in (("tensorrt", "8.6.2", "10.3"), ("tensorrt_rtx", "1.2.0.54", "1.4")):
        sys.modules[name].__version__ = old  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=f"{name} {old} is too old to run plans: {wanted} or newer; "):
            load_backend(name, {}, {})


def test_another_version_than_the_plan_is_found_before_anything_is_loaded(
    standin: StandIn, bundle: Path
) -> None:
    sys.modules["tensorrt"].__version__ = "10.3.1.1"  # type: ignore[attr-defined]
    said = message(bundle, BOARD)
    assert "does not fit: the version of tensorrt is 10.3.1.1, but it was built for 10.3.0.30" in said
    assert "trimvlm build" in said


def test_the_bindings_are_not_installed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert message(bundle) == (
        "the bindings of CUDA are not installed; pip install 'cuda-python==13.*' (12.* where CUDA is 12, as "
        "on JetPack 6)"
    )


def test_the_bindings_do_not_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> Any:
            if name == "cuda.cudart":
                raise ImportError("libcudart.so: wrong ELF class")

    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(sys.modules["cuda"], "__path__", [], raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert message(bundle).startswith(
        "cuda-python is installed, but does not load (libcudart.so: wrong ELF class); pip install"
    )


def test_the_bindings_under_their_older_name(
    standin: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuda-python before 12.6 has `cuda.cudart` only."""
    packages = {"cuda": ModuleType("cuda"), "cuda.bindings": None, "cuda.bindings.runtime": None}
    for name, module in {**packages, "cuda.cudart": standin.cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    with Session.open(bundle, target=CARD) as session:
        assert "".join(session.generate("w20", max_new_tokens=2))


@pytest.mark.parametrize(
    ("error", "driver", "said"),
    [
        (
            cudaError_t.cudaErrorInsufficientDriver,
            0,
            "no NVIDIA driver answers on this machine; install the ",
        ),
        (
            cudaError_t.cudaErrorInsufficientDriver,
            12060,
            "the NVIDIA driver is for CUDA 12.6, cuda-python for 13.0; update the driver, or pip install "
            "'cuda-python==12.*'",
        ),
        (cudaError_t.cudaErrorNoDevice, 13000, "CUDA finds no GPU, "),
        (cudaError_t.cudaSuccess, 13000, "CUDA finds no GPU, "),
        (
            cudaError_t.cudaErrorIllegalAddress,
            13000,
            "CUDA does not start: error 700; see what trimvlm doctor",
        ),
    ],
)
def test_there_is_no_gpu(standin: StandIn, bundle: Path, error: Any, driver: int, said: str) -> None:
    standin.cuda.count_error, standin.cuda.driver, standin.cuda.devices = error, driver, 0
    assert message(bundle).startswith(said)


def test_an_option_that_is_none(bundle: Path) -> None:
    assert (
        message(bundle, threads=2) == "threads: no option of tensorrt_rtx; it has graphs, turns, cuda_graph"
    )
    assert "cuda_graph: no option of tensorrt; it has" in message(bundle, BOARD, cuda_graph=True)


def test_a_plan_that_the_library_refuses(standin: StandIn, bundle: Path, tmp_path: Path) -> None:
    """The library's own reason is part of the message."""
    plan = tmp_path / "decoder.engine"
    for data, said in (
        (b"no plan at all", "(IRuntime::deserializeCudaEngine: Serialization assertion header.magicTag"),
        ((bundle / f"toy.{BOARD}.decoder.engine").read_bytes(), "is not compatible with this version"),
    ):
        plan.write_bytes(data)
        with pytest.raises(UserError) as caught, load_backend("tensorrt_rtx", {"decoder": plan}, {}):
            pass
        assert str(caught.value).startswith(f"{plan}: tensorrt_rtx 1.7.1.116 cannot load this plan (")
        assert said in str(caught.value) and str(caught.value).endswith(
            "; build it again with trimvlm build on this machine"
        )


def test_a_plan_without_weights_and_another_graph(standin: StandIn, bundle: Path, tmp_path: Path) -> None:
    graph = bundle / "vision.onnx"
    ranges = [{"pixel_values": [[1, 3, 4, 4]] * 3}]
    plan = tmp_path / "vision.engine"
    plan.write_bytes(write_plan(graph, ranges, library="tensorrt", version="10.3.0.30", stripped=True))
    other = bundle / "toy.decoder.fused.onnx"
    with (
        pytest.raises(
            UserError, match=r"cannot put the weights of toy.decoder.fused.onnx in .*; build it again"
        ),
        load_backend("tensorrt", {"vision": plan}, {"graphs": {"vision": other}}),
    ):
        pass


def test_the_gpu_is_too_small(standin: StandIn, bundle: Path) -> None:
    standin.device.memory = 0
    assert message(bundle).endswith(
        "cannot load this plan (IRuntime::deserializeCudaEngine: Error Code 2: OutOfMemory (Requested size "
        "was not available)); free memory on the GPU, or let the engines take turns (turns=True)"
    )
    standin.device.memory = 12_000
    assert message(bundle) == (
        "the GPU has no room for activations: 0.0 MiB are wanted, 0 of 0 MiB are free; close other programs, "
        "let the engines take turns (turns=True), or build for smaller limits of the target"
    )


def test_the_gpu_fails_at_work(standin: StandIn, bundle: Path) -> None:
    """Everything is given back although every call then fails."""
    with pytest.raises(UserError) as caught, Session.open(bundle, target=CARD) as session:
        standin.cuda.failing.add("cudaStreamSynchronize")
        session.vision([toy_pixels(1)])
    assert str(caught.value).startswith(
        "CUDA: cudaStreamSynchronize: an illegal memory access was encountered (error 700); start the program"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("execute_async_v3", "does not run (no reason given); build it again"),
        ("set_input_shape", "does not take input_ids of"),
        ("set_tensor_address", "does not take an address for input_ids"),
    ],
)
def test_the_library_says_no(
    standin: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    """And a run that failed does not spoil the next."""
    with Session.open(bundle, target=CARD) as session:
        prompt, rows = session.prompt("w20", 1), session.vision([toy_pixels(1)])
        with monkeypatch.context() as patch:
            patch.setattr(Context, name, lambda *_: False)
            with pytest.raises(UserError) as caught:
                session.prefill(prompt, rows)
        assert said in str(caught.value)
        with Session.open(bundle) as wanted:
            expected = wanted.prefill(prompt, rows)
        np.testing.assert_array_equal(session.prefill(prompt, rows)["logits"], expected["logits"])


def test_a_range_is_refused(standin: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> bool:
        raise RuntimeError("Error in set optimization profile async.")

    bundle = write_toy_bundle(tmp_path / "split", eos=())
    target = msgspec.structs.replace(targets.load(BOARD), compute_capability="8.9", ranges="split")
    build(bundle, target)
    monkeypatch.setattr(Context, "set_optimization_profile_async", refuse)
    assert "does not take a shape range (no reason given); build it again" in message(bundle, BOARD)


def test_the_library_does_not_start(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(logger: Any) -> None:
        logger.log(logger.Severity.ERROR, "CUDA initialization failure with error: 35.")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "Runtime", fail)
    assert message(bundle) == (
        "tensorrt_rtx 1.7.1.116 does not start (CUDA initialization failure with error: 35.); see trimvlm "
        "doctor"
    )


def test_shapes_cannot_be_inferred(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def infer_shapes(_: Context) -> list[str]:
        raise RuntimeError("a broadcast\nof incompatible shapes")

    monkeypatch.setattr(Context, "infer_shapes", infer_shapes)
    assert "cannot infer shapes (a broadcast of incompatible shapes); build it again" in message(bundle)


def test_more_than_the_engine_was_built_for(bundle: Path) -> None:
    with Session.open(bundle, target=CARD) as session:
        image = [toy_pixels(1)]

        def ask(text: str, images: int, new: int) -> str:
            with pytest.raises(UserError) as caught:
                prompt = session.prompt(text, images)
                outputs = session.prefill(prompt, session.vision(image * images))
                for _ in range(new):
                    outputs = session.step(7, outputs)
            return str(caught.value)

        assert ask("w20 w21 w22 w23 w24 w25", 0, 0) == (
            "the decoder engine takes input_ids of [1] to [8], not [9]; ask for less (shorter text, fewer "
            "images or new tokens), or build it for a target with larger limits.text"
        )
        assert "takes visual of [0, 3] to [4, 3], not [8, 3]" in ask("w20", 2, 0)
        assert "larger limits.images" in ask("w20", 2, 0)
        # The past has room for 4 visual rows, 8 of text and 52 new ones; a prefill makes 8 rows of it.
        assert ask("w20", 1, 99) == (
            "the decoder engine has no room for 260 bytes of present_key.0; ask for less, or build it for a "
            "target with larger limits.new_tokens (or limits.text)"
        )
        outputs = session.prefill(session.prompt("w20", 1), session.vision(image))
        for _ in range(64 - 8):
            outputs = session.step(7, outputs)
        assert outputs["present_key.0"].shape[2] == 64


def test_the_range_with_the_smallest_maxima_is_taken() -> None:
    wide = {"a": Range((0, 2), (9, 2)), "b": Range((0,), (4,))}
    narrow = {"a": Range((1, 2), (1, 2)), "b": Range((0,), (4,))}
    assert choose("decoder", [wide, narrow], {"a": (1, 2), "b": (3,)}) == 1
    assert choose("decoder", [wide, narrow], {"a": (2, 2), "b": (3,)}) == 0
    with pytest.raises(UserError, match=r"takes b of \[0\] to \[4\], not \[5\]"):
        choose("decoder", [wide, narrow], {"a": (2, 2), "b": (5,)})
    with pytest.raises(UserError, match=r"takes a of \[0, 2\] to \[9, 2\], not \[1\]"):
        choose("decoder", [wide, narrow], {"a": (1,), "b": (1,)})


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_the_real_library_without_a_gpu(tmp_path: Path) -> None:
    """A plan of the real TensorRT-RTX, opened where there is no driver: one line, no traceback."""
    if machine.compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    bundle = write_toy_bundle(tmp_path / "bundle", eos=())
    build(bundle, msgspec.structs.replace(targets.load(CARD), limits=LIMITS))
    code = "import sys; from trimvlm_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["run", str(bundle), "--target", CARD, "--prompt", "w20"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert (
        "does not fit: the GPU's SM is none, but it was built for 8.9; no GPU answers here: see trimvlm"
        in line
    )
    # Without the guards: what the library and the bindings themselves say.
    with (
        pytest.raises(UserError, match=r"bindings of CUDA are not installed|no NVIDIA driver answers"),
        load_backend("tensorrt_rtx", {"decoder": bundle / f"toy.{CARD}.decoder.engine"}, {}),
    ):
        pass
