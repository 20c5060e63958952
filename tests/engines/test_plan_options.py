"""Split ranges, stripped plans, and the cost of a build in its manifest: by TensorRT-RTX, without a GPU."""

from __future__ import annotations

import json
import mmap
import time
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from fake_library import two_profiles
from onnx import TensorProto, helper

from trimvlm import machine
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.target import PlanOptions
from trimvlm_engines import memory, targets
from trimvlm_engines.build import build
from trimvlm_engines.library import Work
from trimvlm_engines.memory import Peak, anonymous_bytes
from trimvlm_engines.shapes import ShapeRange, split
from trimvlm_engines.tensorrt_rtx import TensorRtRtx

trt = pytest.importorskip("tensorrt_rtx")

CARD = targets.load("rtx-4090")
ROWS, WIDTH, LAYERS = 64, 1024, 8


class Memory:
    """A plan in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes | memoryview) -> int:
        self.data += data
        return len(data)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A graph of matrices with 32 MB of weights in a file beside it, and the size of that file."""
    path = tmp_path_factory.mktemp("heavy") / "heavy.onnx"
    rng = np.random.default_rng(0)
    tensors, nodes, here = [], [], "x"
    for layer in range(LAYERS):
        tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
        tensor.raw_data = rng.standard_normal((WIDTH, WIDTH), np.float32).tobytes()
        tensors.append(tensor)
        nodes += [helper.make_node("MatMul", [here, f"w{layer}"], [f"m{layer}"])]
        nodes += [helper.make_node("Relu", [f"m{layer}"], [here := f"h{layer}"])]
    kind, shape = TensorProto.FLOAT, ["rows", WIDTH]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info(here, kind, shape)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location="heavy.bin", size_threshold=0)
    return path, (path.parent / "heavy.bin").stat().st_size


def ranges(low: int, typical: int, high: int) -> dict[str, ShapeRange]:
    return {"x": ShapeRange(min=(low, WIDTH), opt=(typical, WIDTH), max=(high, WIDTH))}


def test_split_ranges_store_the_weights_twice(heavy: tuple[Path, int]) -> None:
    """Why `joint` is the default; both plans are whole, and say how many profiles they have."""
    graph, weights = heavy
    joint, both = Memory(), Memory()
    library = TensorRtRtx(CARD)
    library.make(Work(graph, ranges(1, ROWS, ROWS), "float32", sink=joint))
    phases = ranges(1, ROWS, ROWS), ranges(1, 1, 1)
    library.make(Work(graph, ranges(1, ROWS, ROWS), "float32", phases=phases, sink=both))
    assert 1.0 < len(joint.data) / weights < 1.2
    assert 0.9 < (len(both.data) - len(joint.data)) / weights < 1.2


def test_a_split_decoder_has_a_range_for_prefill_and_one_for_decode() -> None:
    joint = {
        "input_ids": ShapeRange(min=(1,), opt=(32,), max=(512,)),
        "visual": ShapeRange(min=(0, 8), opt=(16, 8), max=(32, 8)),
        "past_key.0": ShapeRange(min=(1, 2, 0, 4), opt=(1, 2, 0, 4), max=(1, 2, 900, 4)),
        "forced.0": ShapeRange(min=(0,), opt=(0,), max=(9,)),
    }
    prefill, decode = split(joint)
    assert prefill == joint | {"past_key.0": ShapeRange(min=(1, 2, 0, 4), opt=(1, 2, 0, 4), max=(1, 2, 0, 4))}
    assert {name: shape.plain() for name, shape in decode.items()} == {
        "input_ids": [[1]] * 3,
        "visual": [[0, 8]] * 3,
        "past_key.0": [[1, 2, 0, 4], [1, 2, 900, 4], [1, 2, 900, 4]],
        "forced.0": [[0]] * 3,
    }


def test_split_is_built_recorded_and_kept(tmp_path: Path) -> None:
    bundle = two_profiles(tmp_path / "bundle")
    joint = build(bundle, CARD, "toy")
    both = build(bundle, msgspec.structs.replace(CARD, ranges="split"), "toy")
    assert joint.options["decoder"]["phases"] == [] and len(both.options["decoder"]["phases"]) == 2
    assert both.options["vision"]["phases"] == []
    assert both.options["decoder"]["ranges"] == joint.options["decoder"]["ranges"]
    assert both.measured["decoder_bytes"] > joint.measured["decoder_bytes"]
    before = (bundle / "manifest.json").read_bytes()
    assert build(bundle, msgspec.structs.replace(CARD, ranges="split"), "toy") == both
    assert (bundle / "manifest.json").read_bytes() == before


def test_cost_is_in_the_manifest(tmp_path: Path) -> None:
    bundle = two_profiles(tmp_path / "bundle")
    build(bundle, CARD, "toy")
    manifest = json.loads((bundle / "manifest.json").read_text())
    measured = manifest["profiles"]["toy"]["engines"]["rtx-4090"]["measured"]
    for role in ("vision", "decoder"):
        assert measured[f"{role}_seconds"] > 0
        assert measured[f"{role}_bytes"] == next(
            file["bytes"]
            for name, file in manifest["files"].items()
            if name.endswith(".engine") and role in name
        )
        if anonymous_bytes() is not None:
            assert measured[f"{role}_peak_bytes"] > 30e6  # the library alone takes more
    plans = measured["vision_bytes"] + measured["decoder_bytes"]
    assert measured["weights_ratio"] == round(
        plans / manifest["files"]["checkpoint/model.safetensors"]["bytes"], 4
    )


def test_the_parser_maps_the_weights(heavy: tuple[Path, int]) -> None:
    """They are in memory once at most, and not at all while the graph is parsed."""
    if anonymous_bytes() is None:
        pytest.skip("only Linux says how much memory is private")
    graph, weights = heavy
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    before = anonymous_bytes()
    with Peak() as peak:
        assert parser.parse_from_file(str(graph))
    assert peak.bytes is not None and before is not None
    assert peak.bytes - before < weights / 4


def test_peak_is_the_most_that_was_held(tmp_path: Path) -> None:
    if anonymous_bytes() is None:
        pytest.skip("only Linux says how much memory is private")
    before = anonymous_bytes()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # malloc may hand out what is held already
    with Peak() as peak, mmap.mmap(-1, 64 << 20, flags=private) as held:
        held[::4096] = bytes(len(held) // 4096)
        time.sleep(0.1)
    assert peak.bytes is not None and before is not None
    assert 60 << 20 < peak.bytes - before < 80 << 20
    assert anonymous_bytes(tmp_path / "no such file") is None


def test_where_nobody_can_look_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: None)
    engine = build(two_profiles(tmp_path / "bundle"), CARD, "toy")
    assert not [key for key in engine.measured if "peak" in key]


@pytest.mark.parametrize(("found", "said"), [(None, "no GPU"), ("8.6", "a GPU of SM 8.6")])
def test_stripped_needs_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None, said: str
) -> None:
    monkeypatch.setattr(machine, "compute_capability", lambda: found)
    bundle = two_profiles(tmp_path / "bundle")
    target = msgspec.structs.replace(CARD, plan=PlanOptions(stripped=True))
    with pytest.raises(
        UserError, match=rf"plan.stripped: .*SM 8.9\), but this one has {said}; leave"
    ) as caught:
        build(bundle, target, "toy")
    assert "\n" not in str(caught.value)
    Bundle(bundle).verify()


def test_without_a_gpu_the_library_itself_refuses_to_strip(
    heavy: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with 1.7.1; when this fails, the refusal above can go."""
    if machine.compute_capability() is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(machine, "compute_capability", lambda: "8.9")
    library = TensorRtRtx(msgspec.structs.replace(CARD, plan=PlanOptions(stripped=True)))
    with pytest.raises(UserError, match=r"heavy.onnx: tensorrt_rtx .* cannot build it: "):
        library.make(Work(heavy[0], ranges(1, ROWS, ROWS), "float32", sink=Memory()))


@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        (
            "rtx-4090",
            {"version_compatible": True},
            "plan: version_compatible: a TensorRT-RTX plan belongs to",
        ),
        ("ort-cpu", {"stripped": True}, "plan: ONNX Runtime has no plans; leave it out"),
        (
            "h100",
            {"version_compatible": True, "stripped": True},
            "version_compatible and stripped exclude each",
        ),
    ],
)
def test_plan_options_that_no_target_has(name: str, plan: dict[str, bool], said: str) -> None:
    with pytest.raises(UserError, match=said):
        msgspec.structs.replace(targets.load(name), plan=PlanOptions(**plan))
