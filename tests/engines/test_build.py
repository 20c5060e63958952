"""`build` on ONNX Runtime: what is recorded, what is kept, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnxruntime
import pytest
from method_decisions import METHODS
from operator_list import refused

from trimvlm.bundle import Bundle, record, write_manifest
from trimvlm.errors import UserError
from trimvlm.opening import on_cpu
from trimvlm.target import Limits
from trimvlm_engines import targets
from trimvlm_engines.build import build

Contents = Callable[[], dict[str, bytes]]


def states_of(bundle: Path, *args: object) -> list[tuple[str, str]]:
    """Builds and returns what was told."""
    told: list[tuple[str, str]] = []
    build(bundle, *args, tell=lambda role, state: told.append((role, state)))  # type: ignore[arg-type]
    return [pair for pair in told if pair[1] != "building"]


def test_engine_is_recorded(bundle: Path) -> None:
    engine = build(bundle, "ort-cpu", "fastv")
    opened = Bundle(bundle)
    assert opened.manifest.profiles["fastv"].engines == {"ort-cpu": engine}
    assert (engine.backend, engine.version) == ("onnxruntime", onnxruntime.__version__)
    entry = opened.manifest.profiles["fastv"]
    assert engine.graphs == {"vision": entry.vision, "decoder": entry.decoders[on_cpu(entry)]}
    assert engine.profile_digest == opened.profile("fastv").digest
    assert engine.measured["decoder_seconds"] > 0
    opened.verify()


def test_second_build_is_skipped_and_changes_nothing(bundle: Path, contents: Contents) -> None:
    first = build(bundle, profile="dense")
    before = contents()
    assert states_of(bundle, "ort-cpu", "dense") == [("vision", "up to date"), ("decoder", "up to date")]
    assert contents() == before
    assert build(bundle, profile="dense") == first


def test_vision_is_shared_by_profiles(bundle: Path) -> None:
    build(bundle, profile="dense")
    assert states_of(bundle, "ort-cpu", "vtw") == [("vision", "up to date"), ("decoder", "built")]
    assert set(Bundle(bundle).manifest.profiles["vtw"].engines["ort-cpu"].graphs) == {"vision", "decoder"}


@pytest.mark.parametrize("change", ["graph", "library", "weights"])
def test_stale_parts_are_built_again(bundle: Path, change: str) -> None:
    build(bundle, profile="dense")
    manifest = Bundle(bundle).manifest
    entry = manifest.profiles["dense"]
    engine = entry.engines["ort-cpu"]
    files = dict(manifest.files)
    both = {"vision", "decoder"}
    if change == "library":
        engine, expected = msgspec.structs.replace(engine, version="1.24.0"), both
    else:
        name = entry.decoders[on_cpu(entry)] if change == "graph" else manifest.weights[0]
        data = bytearray((bundle / name).read_bytes())
        if change == "graph":
            data += b"\x32\x01x"  # the model's doc_string
        else:
            data[-1] ^= 1
        (bundle / name).unlink()  # the weights are linked to the checkpoint
        (bundle / name).write_bytes(data)
        files[name] = record(bundle / name)
        expected = {"decoder"} if change == "graph" else both
    entry = msgspec.structs.replace(entry, engines={"ort-cpu": engine})
    write_manifest(bundle, msgspec.structs.replace(manifest, profiles={"dense": entry}, files=files))
    assert {role for role, state in states_of(bundle, "ort-cpu", "dense") if state == "built"} == expected
    assert Bundle(bundle).manifest.profiles["dense"].engines["ort-cpu"].version == onnxruntime.__version__


def test_graph_that_does_not_run_is_refused_and_not_recorded(bundle: Path, contents: Contents) -> None:
    import onnx

    entry = Bundle(bundle).manifest.profiles["dense"]
    graph = bundle / entry.decoders[on_cpu(entry)]
    model = onnx.load(graph, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "RMSNormalization":
            node.op_type = "RMSNormalisation"
    manifest = Bundle(bundle).manifest
    graph.write_bytes(model.SerializeToString())
    files = {**manifest.files, graph.name: record(graph)}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    before = contents()
    with pytest.raises(
        UserError, match=rf"{graph.name}: ONNX Runtime .* cannot load this graph .*RMSNormalisation"
    ):
        build(bundle, profile="dense")
    assert contents() == before


def test_refusals_before_anything_is_built(bundle: Path, contents: Contents) -> None:
    before = contents()
    cpu = targets.load("ort-cpu")
    half = msgspec.structs.replace(cpu, name="half", dtypes=("float16",))
    small = msgspec.structs.replace(cpu, name="small", memory_gb=1e-5)
    new = msgspec.structs.replace(cpu, name="new", versions=">=99")
    for target, profile, message in (
        ("ort-cpu", None, "say which profile; it holds dense, fastv, "),
        ("ort-cpu", "sparse", "no profile 'sparse'; it holds dense"),
        ("gpu", "dense", "no target 'gpu'"),
        (half, "dense", "the weights are float32, but target half runs float16; export with --dtype float16"),
        (small, "dense", "0.0 GiB of weights do not fit target small with 1e-05 GB"),
        (new, "dense", f"onnxruntime {onnxruntime.__version__} is installed, but it takes >=99"),
    ):
        with pytest.raises(UserError, match=message):
            build(bundle, target, profile)
    assert contents() == before


def test_no_bundle_gets_no_lock_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json here; make a bundle with trimvlm export"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"no manifest\.json here"):
        build(tmp_path / "nowhere")


def test_importing_loads_no_library() -> None:
    code = (
        "import sys, trimvlm_engines.build, trimvlm_engines.tensorrt_rtx, trimvlm_engines.tensorrt_classic, "
        "trimvlm_engines.onnx_runtime; "
        "heavy = {'tensorrt', 'tensorrt_rtx', 'onnxruntime', 'torch', 'onnx', 'yaml'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_limits_of_the_own_target_reach_the_plan(exported: Path) -> None:
    from trimvlm_engines.build import parts

    opened = Bundle(exported)
    name, entry = opened.entry("fastv")
    target = msgspec.structs.replace(
        targets.load("rtx-4090"), limits=Limits(images=3, text=10, new_tokens=20)
    )
    found = parts(opened, name, entry, target)
    assert found["decoder"].plan == "fastv.rtx-4090.decoder.engine"
    assert found["vision"].plan == "vision.rtx-4090.engine"
    assert found["decoder"].ranges["past_key.4"].max[2] == 3 * 8 + 30
    assert found["vision"].ranges["pixel_values"].max[0] == 3


@pytest.mark.parametrize("name", METHODS)
def test_tensorrt_10_3_knows_every_operator(exported: Path, name: str) -> None:
    bundle = Bundle(exported)
    _, entry = bundle.entry(name)
    for file in (entry.decoders["primitive"], entry.vision):
        assert refused(bundle.path(file)) == [], file
    found = refused(bundle.path(entry.decoders["fused"]))
    assert {"operator Attention", "operator RMSNormalization", "operator RotaryEmbedding"} <= set(found)
