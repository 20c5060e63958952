"""Plans run on the stand-in for TensorRT: answers, traffic, memory, turns. No GPU takes part.

The toy bundle goes the whole way: built, recorded in the manifest, checked at opening, run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.parser
import pytest
from tensorrt_standin import RefusedError, StandIn
from tensorrt_standin.engine import Context, CudaGraphStrategy
from tensorrt_standin.plans import write_plan
from toy_bundle import WORDS, toy_pixels, write_toy_bundle

from trimvlm import Session, UserError
from trimvlm.backends import load_backend, run_tensorrt_rtx
from trimvlm.backends.bfloat16 import from_bits, to_bits
from trimvlm.backends.cuda import Cuda
from trimvlm.sampling import make_sampler
from trimvlm.target import Limits, Target
from trimvlm_engines import targets
from trimvlm_engines.build import build

CARD, BOARD = "rtx-4090", "jetson-orin-nano-8gb-jp7"
QUESTION, TOKENS = "w20 w33", 12
SMALL = Limits(images=3, text=16, new_tokens=16)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Nothing may be left on it."""
    made = StandIn(monkeypatch)
    yield made
    made.device.assert_clean()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "bundle", eos=())


def of(name: str, **changes: Any) -> Target:
    """A shipped target with small limits."""
    return msgspec.structs.replace(targets.load(name), limits=SMALL, **changes)


def pictures(count: int) -> list[np.ndarray]:
    return [toy_pixels(1.5 * number + 1) for number in range(count)]


def tokens(session: Session, images: int = 1, count: int = TOKENS) -> Iterator[int]:
    """Greedy tokens, the caches kept where the backend has them."""
    (runner,) = session._runners.values()
    prompt = session.prompt(QUESTION, images)
    return runner.generate(
        prompt,
        pictures(images),
        make_sampler(0.0, 1.0, 0),
        session.timings,
        session._check_open,
        max_new_tokens=count,
    )


def reference(bundle: Path, images: int = 1, count: int = TOKENS) -> list[int]:
    """By ONNX Runtime."""
    with Session.open(bundle) as session:
        return list(tokens(session, images, count))


@pytest.mark.parametrize("target", [CARD, BOARD])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("images", [0, 1, 3])
def test_answers(standin: StandIn, tmp_path: Path, target: str, dtype: str, images: int) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle", dtype=dtype, eos=())
    if target == BOARD:
        standin.at("8.7")
    build(bundle, of(target))
    with Session.open(bundle, target=target) as session:
        for _ in range(2):
            assert list(tokens(session, images)) == reference(bundle, images)
        said = "".join(session.generate(QUESTION, max_new_tokens=4)).split()
        assert said == [WORDS[token] for token in reference(bundle, 0, 4)]


def test_every_output_of_each_step(standin: StandIn, bundle: Path) -> None:
    """Arrays in and out, as parity has them."""
    build(bundle, of(CARD))
    with Session.open(bundle) as wanted, Session.open(bundle, target=CARD) as session:
        found = []
        for each in (wanted, session):
            outputs = each.prefill(each.prompt(QUESTION, 1), each.vision(pictures(1)), [np.array([1, 3])])
            found.append([outputs, each.step(7, outputs)])
        for one, other in zip(*found, strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name], name)
        assert found[1][0]["selected.0"].tolist() == [1, 3]


def test_only_what_is_fed_and_fetched_is_copied(standin: StandIn, bundle: Path) -> None:
    build(bundle, of(CARD))
    with Session.open(bundle, target=CARD) as session:
        answer = tokens(session)
        next(answer)
        copies = standin.device.copies
        copies.clear()
        next(answer)
        next(answer)
        # An id and a position, then 64 logits of float32: never a cache.
        assert copies == [("up", 8), ("up", 8), ("down", 256)] * 2


def test_memory_is_allocated_at_opening_and_given_back(standin: StandIn, bundle: Path) -> None:
    device = standin.device
    build(bundle, of(CARD))
    session = Session.open(bundle, target=CARD)
    assert not device.device and not device.host
    for _ in range(2):  # a session can be entered again
        with session:
            held = set(device.device)
            wanted = list(tokens(session))
            assert list(tokens(session, 3)) != wanted
            assert list(tokens(session)) == wanted
            assert set(device.device) == held
        device.assert_clean()


def test_answers_under_way_at_once_do_not_disturb_each_other(standin: StandIn, bundle: Path) -> None:
    build(bundle, of(CARD))
    wanted = [reference(bundle, images) for images in (1, 2, 0)]
    with Session.open(bundle, target=CARD) as session:
        held = len(standin.device.device)
        answers = [tokens(session, images) for images in (1, 2, 0)]
        assert [list(each) for each in zip(*answers, strict=True)] == [
            list(each) for each in zip(*wanted, strict=True)
        ]
        more = len(standin.device.device) - held
        assert more > 0
        answers = [tokens(session, images) for images in (1, 2, 0)]
        for answer in answers:
            next(answer)
        del answers, answer  # left unfinished
        assert list(tokens(session, 2)) == wanted[1]
        assert len(standin.device.device) - held == more  # the same buffers served


def test_a_past_of_a_closed_session_is_refused(standin: StandIn, bundle: Path) -> None:
    build(bundle, of(CARD))
    session = Session.open(bundle, target=CARD)
    with session:
        answer = tokens(session)
        next(answer)
    with pytest.raises(UserError, match="the session is closed"):
        next(answer)
    with session:
        answer = tokens(session)
        next(answer)
        session.__exit__(None, None, None)
        session.__enter__()
        with pytest.raises(AssertionError, match="of a session that was closed"):
            next(answer)


def test_not_waiting_would_show(standin: StandIn, bundle: Path) -> None:
    """Whoever forgets to synchronise gets no numbers, and cannot use the memory again."""
    build(bundle, of(CARD))
    with Session.open(bundle, target=CARD) as session:
        prompt, rows = session.prompt(QUESTION, 1), session.vision(pictures(1))
        (backend,) = session._runner.backends.values()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Cuda, "synchronize", lambda *_: None)
            assert np.isnan(session.prefill(prompt, rows)["logits"]).all()
        with pytest.raises(RefusedError, match="freed while a copy to the device is queued"):
            backend._staging.close()
        backend._cuda.settle(backend._stream)
        assert list(tokens(session)) == reference(bundle)


@pytest.mark.parametrize("ranges", ["joint", "split"])
def test_prefill_and_decode_take_their_ranges(
    standin: StandIn, bundle: Path, ranges: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    before = Context.set_optimization_profile_async

    def record(context: Context, number: int, stream: int) -> bool:
        taken.append(number)
        return before(context, number, stream)

    monkeypatch.setattr(Context, "set_optimization_profile_async", record)
    build(bundle, of(BOARD, ranges=ranges, compute_capability="8.9"))
    with Session.open(bundle, target=BOARD) as session:
        taken.clear()
        assert list(tokens(session)) == reference(bundle)
        assert list(tokens(session, 2)) == reference(bundle, 2)
    assert taken == ([] if ranges == "joint" else [0, 1, 0, 1])


@pytest.mark.parametrize("target", [CARD, BOARD])
def test_turns_save_memory(standin: StandIn, bundle: Path, target: str) -> None:
    """One image after the other: the engines are never on the device together."""
    plans = {"vision": "vision.onnx", "decoder": "toy.decoder.fused.onnx"}
    build(bundle, of(target, compute_capability="8.9"))
    wanted, peaks = reference(bundle), []
    for turns in (False, True):
        standin.device.peak = 0
        with Session.open(bundle, target=target, turns=turns) as session:
            for _ in range(2):
                assert list(tokens(session)) == wanted
                loaded = standin.loaded()
                assert loaded == ([plans["decoder"]] if turns else sorted(plans.values()))
            answer = tokens(session)
            next(answer)
            assert list(tokens(session, 2)) == reference(bundle, 2)  # has the vision engine in between
            assert list(answer) == wanted[1:]
        peaks.append(standin.device.peak)
    assert peaks[1] < peaks[0]


def test_turns_are_taken_where_the_engines_do_not_fit_together(
    standin: StandIn, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, of(CARD))
    plan = bundle / f"vision.{CARD}.engine"
    with Session.open(bundle, target=CARD):
        assert len(standin.loaded()) == 2
    monkeypatch.setattr(Cuda, "available", lambda _: plan.stat().st_size - 1)
    with Session.open(bundle, target=CARD) as session:
        assert standin.loaded() == ["vision.onnx"]
        assert list(tokens(session)) == reference(bundle)
    with Session.open(bundle, target=CARD, turns=False):
        assert len(standin.loaded()) == 2


def test_memory_of_a_board_is_more_than_cuda_calls_free(standin: StandIn, tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:        9000000 kB\nMemAvailable:    5000000 kB\n")
    free = standin.device.memory
    assert Cuda().available(meminfo) == free
    standin.cuda.integrated = 1
    assert Cuda().available(meminfo) == 5_000_000 * 1024
    meminfo.write_text("MemAvailable:    5 kB\n")
    assert Cuda().available(meminfo) == free
    assert Cuda().available(tmp_path / "nothing") == free


def test_compiled_kernels_are_kept(standin: StandIn, bundle: Path, home: Path) -> None:
    build(bundle, of(CARD))
    with Session.open(bundle, target=CARD) as session:
        list(tokens(session))
    kept = {path: path.read_bytes() for path in (home / "trimvlm/kernels").iterdir()}
    assert len(kept) == 2 and all(data.startswith(b"kernels 1.7.1.116\n") for data in kept.values())
    times = {path: path.stat().st_mtime_ns for path in kept}
    with Session.open(bundle, target=CARD) as session:
        list(tokens(session))
    assert {path: path.stat().st_mtime_ns for path in kept} == times  # nothing new was compiled
    for path in kept:
        path.write_bytes(b"kernels 1.6.0.1\n")
    with Session.open(bundle, target=CARD) as session:
        list(tokens(session, 2))
    assert all(path.read_bytes().startswith(b"kernels 1.7.1.116\n") for path in kept)


def test_kernels_that_cannot_be_kept_cost_no_answer(
    standin: StandIn, bundle: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, of(CARD))
    (home / "trimvlm").mkdir(parents=True)
    (home / "trimvlm/kernels").write_text("a file where the folder should be")
    with Session.open(bundle, target=CARD) as session:
        assert list(tokens(session)) == reference(bundle)
    monkeypatch.setattr(run_tensorrt_rtx, "cache_directory", lambda: None)
    with Session.open(bundle, target=CARD) as session:
        assert list(tokens(session)) == reference(bundle)


@pytest.mark.parametrize("wanted", [False, True])
def test_cuda_graphs_are_captured_where_asked(
    standin: StandIn, bundle: Path, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, of(CARD))
    with Session.open(bundle, target=CARD, cuda_graph=wanted) as session:
        (backend,) = session._runner.backends.values()
        strategies = {plan._context._config.cuda_graph_strategy for plan in backend._plans.values()}
        assert list(tokens(session)) == reference(bundle)
    assert strategies == {CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if wanted else CudaGraphStrategy.DISABLED}


@pytest.mark.parametrize("option", ["stripped", "version_compatible"])
def test_plans_without_weights_and_for_several_versions(standin: StandIn, bundle: Path, option: str) -> None:
    target = of(BOARD, compute_capability="8.9")
    plan = msgspec.structs.replace(target.plan, **{option: True})
    build(bundle, msgspec.structs.replace(target, plan=plan))
    with Session.open(bundle, target=BOARD) as session:
        assert list(tokens(session)) == reference(bundle)


def test_shapes_that_the_engine_does_not_say(standin: StandIn, bundle: Path) -> None:
    """As TensorRT 10.16 on Thor was reported to do; strides say what the caches have."""
    build(bundle, of(CARD))
    standin.hides_shapes = True
    with Session.open(bundle, target=CARD) as session:
        (runner,) = session._runners.values()
        visual = session.vision  # its rows are the first dimension, which no stride gives
        with pytest.raises(UserError, match=r"does not say what shape visual has; .*issues/4744"):
            visual(pictures(1))
        wanted = reference(bundle, 0)
        assert list(tokens(session, 0)) == wanted
        assert runner.member == "toy"


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.5, 0xC020),
        (float("inf"), 0x7F80),
        (1 + 2**-8, 0x3F80),  # halfway: to even
        (1 + 3 * 2**-8, 0x3F82),
        (1 + 2**-8 + 2**-20, 0x3F81),
        (3.4e38, 0x7F80),  # rounds beyond the largest
        (1e-40, 0x0001),
    ],
)
def test_bfloat16(value: float, bits: int) -> None:
    assert to_bits(np.array([value], np.float32)).tolist() == [bits]


def test_bfloat16_comes_back() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    values = from_bits(every)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(to_bits(values)[number], every[number])
    assert np.isnan(from_bits(to_bits(values))[~number]).all()


def test_bfloat16_is_converted_on_the_way(standin: StandIn, tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        both (bfloat16[rows, 2] x) => (bfloat16[rows, 2] y, float[rows, 2] z)
        { z = Cast <to = 1> (x)
          w = Add (z, z)
          y = Cast <to = 16> (w) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "both.onnx")
    ranges = [{"x": [[1, 2], [1, 2], [4, 2]]}]
    plan = write_plan(tmp_path / "both.onnx", ranges, library="tensorrt", version="10.3.0.30")
    (tmp_path / "both.engine").write_bytes(plan)
    with load_backend("tensorrt", {"vision": tmp_path / "both.engine"}, {}) as backend:
        assert backend.inputs("vision")["x"].dtype == np.float32
        given = np.array([[1.0, 1 + 2**-9], [3.14159, -7.0]], np.float32)
        found = backend.run("vision", {"x": given}, ["y", "z"])
        np.testing.assert_array_equal(found["z"], from_bits(to_bits(given)))
        np.testing.assert_array_equal(found["y"], from_bits(to_bits(2 * found["z"])))
        assert standin.device.copies == [("up", 8), ("down", 8), ("down", 16)]
