"""Engines with quantised weights, from the build to the parity gate, as a user would go."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny_models import noise_image, tiny_bundle

from trimvlm import Session
from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Select
from trimvlm.rules import LastRowAttention
from trimvlm.target import Weights
from trimvlm_calib.samples import load_samples
from trimvlm_engines import build as build_module
from trimvlm_engines import targets
from trimvlm_engines.build import build
from trimvlm_engines.parts import parts
from trimvlm_engines.quantizing.codes import dequantize, quantize
from trimvlm_engines.quantizing.store import blocked_matrices
from trimvlm_export.families._towers import PROJECTOR, TOWER
from trimvlm_tools.cli import main
from trimvlm_tools.parity.check import HuggingFace, check
from trimvlm_tools.parity.quantized import quantized

METHODS = {
    "dense": Decisions(),
    "staged": Decisions(encoder=EncoderStage(keep=8, by=VisPruner(attention=1, features=1))),
    "late": Decisions(
        inject=1, exit=3, select=(Select(layer=2, keep=5, by=LastRowAttention(attention="own")),)
    ),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("quantized"), METHODS, layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of samples."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        noise_image(number).save(folder / f"{number}.png")
    lines = [json.dumps({"image": f"{n}.png", "question": f"where is w{n} ?"}) for n in range(2)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def stores(bundle: Path) -> list[Path]:
    return sorted(bundle.glob("weights.quantized.*.safetensors"))


def test_profiles_share_one_file_and_pass_the_gate(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for bits in (4, 8):
        assert main(["build", str(bundle), "--target", f"ort-cpu-int{bits}"]) == 0
        assert len(list(bundle.glob(f"weights.quantized.int{bits}x32.*"))) == 1
        capsys.readouterr()
        command = ["check", str(bundle), "--data", str(data), "--samples", "2", "--json"]
        assert main([*command, "--target", f"ort-cpu-int{bits}"]) == 0
        reports = json.loads(capsys.readouterr().out)
        assert [report["profile"] for report in reports] == sorted(METHODS)
        assert any(f"ort-cpu-int{bits}" in rung["name"] for rung in reports[0]["rungs"])
    sizes = {
        bits: path.stat().st_size for path in stores(bundle) for bits in (4, 8) if f"int{bits}" in path.name
    }
    assert sizes[4] < 0.6 * sizes[8]
    assert main(["build", str(bundle), "--target", "ort-cpu-int4", "--json"]) == 0
    assert all(all(parts.values()) for parts in json.loads(capsys.readouterr().out)["up_to_date"].values())


def test_longer_rows_pass_the_gate_as_the_graph_itself(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trimvlm_engines.padding.PAGE", 64)  # bytes: a small model's rows are whole pages
    assert main(["build", str(bundle), "--target", "ort-cpu-padded"]) == 0
    capsys.readouterr()
    command = ["check", str(bundle), "--data", str(data), "--samples", "2", "--json"]
    assert main([*command, "--target", "ort-cpu-padded"]) == 0
    reports = json.loads(capsys.readouterr().out)
    assert [report["profile"] for report in reports] == sorted(METHODS)


def test_the_gate_sees_other_weights(bundle: Path, data: Path, tmp_path: Path) -> None:
    """The reference without the codes is another model: what the gate compares is what the engine reads."""
    build(bundle, "ort-cpu-int4", "dense")
    opened, questions = Bundle(bundle), load_samples(data)[:1]
    unchanged = HuggingFace(opened)
    found = check(opened, "dense", questions, data="tiny", hf=unchanged, target="ort-cpu-int4")
    assert found.verdict == "FAIL"


def test_weights_are_rounded_to_what_the_graph_reads(bundle: Path) -> None:
    """Logits differ from the float engine's, and by as much as four bits allow."""
    build(bundle, "ort-cpu-int4", "dense")
    pixels = noise_image(3)
    logits = {}
    for target in ("ort-cpu", "ort-cpu-int4"):
        with Session.open(bundle, "dense", target) as session:
            prompt = session.prompt("where is w1 ?", 1)
            logits[target] = session.prefill(prompt, session.visual([pixels]).rows)["logits"][0]
    difference = np.abs(logits["ort-cpu"] - logits["ort-cpu-int4"]).max()
    assert 1e-3 < difference < 0.5 * np.abs(logits["ort-cpu"]).max()


def test_a_damaged_store_is_found_and_made_again(bundle: Path) -> None:
    build(bundle, "ort-cpu-int4", "dense")
    (store,) = (path for path in stores(bundle) if "int4" in path.name)
    tensors = load_file(store)
    whole = store.read_bytes()
    name = next(name for name in tensors if name.endswith(".codes"))
    tensors[name] ^= 1
    save_file(tensors, store)
    with pytest.raises(UserError, match=r"weights\.quantized"):
        Session.open(bundle, "dense", "ort-cpu-int4")
    build(bundle, "ort-cpu-int4", "dense")
    assert store.read_bytes() == whole
    Session.open(bundle, "dense", "ort-cpu-int4")


def test_a_head_in_pieces(bundle: Path, data: Path) -> None:
    """The reference puts the pieces together."""
    whole = targets.load("ort-cpu-int4")
    cut = msgspec.structs.replace(
        whole, name="my-pieces", limits=msgspec.structs.replace(whole.limits, lm_head_columns=24)
    )
    build(bundle, cut, "dense")
    found = check(Bundle(bundle), "dense", load_samples(data)[:1], data="tiny", target="my-pieces")
    assert found.verdict == "PASS"


def test_a_stopped_build_leaves_nothing_that_cannot_be_mended(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = msgspec.structs.replace(targets.load("ort-cpu-int8"), weights=Weights(bits=8, block=64))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build_module, "make", stopped)
        build(bundle, target, "dense")
    (store,) = (path for path in stores(bundle) if "int8x64" in path.name)
    Session.open(bundle, "dense")
    store.unlink()
    build(bundle, "ort-cpu", "dense")  # it is forgotten
    engine = build(bundle, target, "dense")
    assert store.is_file()
    assert store.name in engine.options["decoder"]["weights"]
    assert store.name not in engine.options["vision"]["weights"], "profiles with other matrices share that"


def test_rows_that_are_no_whole_blocks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime takes a short block at the end of a row. TensorRT gets smaller blocks, as large as fit; a
    model that none fits is refused."""
    engine = build(bundle, "ort-cpu-int4x128", "dense")
    piece = onnx.load(str(bundle / engine.graphs["decoder"]), load_external_data=False)
    products = [node for node in piece.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 5 * 4 + 2  # keys, values and queries are one but in the last layer
    attributes = [{each.name: each.i for each in node.attribute} for node in products]
    assert {said["block_size"] for said in attributes} == {128}
    assert all(said["K"] % 128 for said in attributes)
    opened, target = Bundle(bundle), targets.load("rtx-4090-int4x128")
    made = parts(opened, *opened.entry("dense"), target)["decoder"].made
    assert made is not None
    model = onnx.load_from_string(made)
    width = {each.name: each.dims[1] for each in model.graph.initializer if each.name.endswith(".codes")}
    for node in (each for each in model.graph.node if each.op_type == "DequantizeLinear"):
        (block,) = (each.i for each in node.attribute if each.name == "block_size")
        assert width[node.input[0]] % block == 0 != width[node.input[0]] % (2 * block)
    monkeypatch.setattr("trimvlm.target.BLOCKS", (128,))
    with pytest.raises(UserError, match=r"weights\.block: no matrix of this model has rows of whole blocks"):
        parts(opened, *opened.entry("dense"), target)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_name_for_activations_in_int8(bits: int) -> None:
    target = targets.load(f"ort-cpu-int{bits}a8")
    assert target.name == f"ort-cpu-int{bits}a8"
    assert target.weights == Weights(bits=bits, activations="int8")  # type: ignore[arg-type]
    wide = targets.load(f"ort-cpu-int{bits}a8x128")
    assert wide.name == f"ort-cpu-int{bits}a8x128"
    assert wide.weights == Weights(bits=bits, activations="int8", block=128)  # type: ignore[arg-type]
    assert targets.load(f"ort-cpu-int{bits}x32") == targets.load(f"ort-cpu-int{bits}")
    with pytest.raises(UserError, match="no target 'ort-cpu-int4x24'"):
        targets.load("ort-cpu-int4x24")
    for other in ("rtx-4090", "ort-cuda", "ort-trt-rtx"):
        with pytest.raises(UserError, match="only ONNX Runtime's CPU provider rounds them to int8"):
            targets.load(f"{other}-int{bits}a8")
    with pytest.raises(UserError, match="no target 'ort-cpu-int2a8'"):
        targets.load("ort-cpu-int2a8")


def test_activations_in_int8(bundle: Path, data: Path, tmp_path: Path) -> None:
    """A target of one's own. Random weights make near ties of the next token: tokens are not gated."""
    said = yaml.safe_load((targets.SHIPPED / "ort-cpu.yaml").read_text())
    said |= {"name": "my-cpu", "weights": {"bits": 4, "block": 16, "activations": "int8"}}
    (tmp_path / "my-cpu.yaml").write_text(yaml.safe_dump(said))
    engine = build(bundle, targets.load(tmp_path / "my-cpu.yaml"), "dense")
    assert engine.options["decoder"]["quantized"]["activations"] == "int8"
    found = check(Bundle(bundle), "dense", load_samples(data), data="tiny", target="my-cpu")
    (rung,) = (rung for rung in found.rungs if "free running" in rung.name)
    gated = {each.name: each for each in rung.metrics if each.limit and "max abs" in each.name}
    assert {each.verdict for each in gated.values()} == {"PASS"}
    assert gated["logits max abs, of the largest"].value > 1e-3, "rounded activations are seen"
    own = str(tmp_path / "my-cpu.yaml")
    assert main(["build", str(bundle), "--target", own, "--profile", "dense"]) == 0
    piece = bundle / "dense.my-cpu.decoder.onnx"
    piece.write_bytes(piece.read_bytes()[:-1])
    again = f"trimvlm build {bundle} --target {own} --profile dense"
    with pytest.raises(UserError, match=re.escape(again)):
        Session.open(bundle, "dense", "my-cpu")
    assert main(again.split()[1:]) == 0, "the command that the error names mends it"
    run = ["run", str(bundle), "--profile", "dense", "--prompt", "where is w1 ?", "--target"]
    assert main([*run, str(tmp_path / "my-cpu.yaml")]) == 0
    assert main([*run, str(tmp_path / "none.yaml")]) == 2


def test_fit_counts_the_codes(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the build too: half the bytes of 8 bits, and scales."""
    sizes = {}
    for target in ("ort-cpu", "ort-cpu-int8", "ort-cpu-int4"):
        assert main(["fit", str(bundle), "--target", target, "--profile", "dense", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        (weights,) = (piece for piece in found["memory"]["pieces"] if piece["name"] == "weights")
        sizes[target] = weights["bytes"]
    opened = Bundle(bundle)
    model = onnx.load(str(opened.path(opened.entry("dense")[1].decoders["fused"])), load_external_data=False)
    values = sum(each.rows * each.width for each in blocked_matrices(model, Weights(bits=4), "matmul"))
    assert sizes["ort-cpu"] - sizes["ort-cpu-int8"] == values * 4 - values - values // 32 * 4
    assert sizes["ort-cpu-int8"] - sizes["ort-cpu-int4"] == values // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "rtx-4090"], "no engine of this bundle that ONNX Runtime runs"),
        (["--target", "ort-cpu-int4", "--write-goldens"], "goldens are of the checkpoint's own weights"),
    ],
)
def test_what_check_cannot_compare(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["check", str(bundle), "--data", str(data), "--samples", "2", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_names_of_targets() -> None:
    plain, small = targets.load("jetson-orin-nano-8gb"), targets.load("jetson-orin-nano-8gb-int4")
    assert small.weights is not None and small.weights.bits == 4 and plain.weights is None
    assert small.limits == plain.limits and small.tested.run is None
    with pytest.raises(UserError, match="'vision' is what other files"):
        msgspec.structs.replace(plain, name="vision")
    with pytest.raises(UserError, match="no target 'ort-cpu-int5'"):
        targets.load("ort-cpu-int5")


def test_int8_activations_bring_the_tower_to_eight_bits(bundle: Path, data: Path) -> None:
    """And the projector, whatever the decoder's bits; alone where an encoder stage works between them. The
    reference computes with what the codes stand for."""
    plain, engine = (build(bundle, target, "staged") for target in ("ort-cpu-int4", "ort-cpu-int4a8x128"))
    assert {role for role in plain.options if "quantized" in plain.options[role]} == {"decoder"}
    said = {role: options["quantized"] for role, options in engine.options.items()}
    assert {role: each["bits"] for role, each in said.items()} == {"vision": 8, "projector": 8, "decoder": 4}
    assert len({each["file"] for each in said.values()}) == 3
    model = onnx.load(str(bundle / engine.graphs["vision"]), load_external_data=False)
    assert "Gemm" not in {node.op_type for node in model.graph.node}
    shared = build(bundle, "ort-cpu-int4a8x128", "dense")
    assert shared.graphs["vision"] == build(bundle, "ort-cpu-int4a8x128", "late").graphs["vision"]

    opened = Bundle(bundle)
    untouched = dict(HuggingFace(opened).model.named_parameters())
    hf = HuggingFace(opened, None, quantized(opened.entry("staged")[1], "ort-cpu-int4a8x128"))
    seeing = (*(f"{TOWER}encoder.layers.{layer}." for layer in (0, 1)), PROJECTOR)
    found = {name: each for name, each in hf.model.named_parameters() if name.startswith(seeing)}
    rounded = {name: weight.detach().numpy() for name, weight in found.items() if weight.ndim == 2}
    assert len(rounded) == 2 * 6 + 2, "of two layers of the tower, and of the projector"
    for name, weight in rounded.items():
        whole = untouched[name].detach().numpy()
        codes, scales = quantize(whole, 8, 128, np.dtype(np.float32))
        assert np.array_equal(weight, dequantize(codes, scales, 8)[:, : weight.shape[1]]), name
        assert not np.array_equal(weight, whole)

    report = check(opened, "staged", load_samples(data), data="tiny", target="ort-cpu-int4a8x128", hf=hf)
    (rung,) = (rung for rung in report.rungs if "free running" in rung.name)
    (visual,) = (each for each in rung.metrics if each.name.startswith("vision features") and each.limit)
    assert visual.verdict in ("PASS", "AMBIGUOUS")  # its patches may tie
    assert visual.value > 1e-3, "rounded activations are seen"


def test_codes_are_packed_even_to_save_memory(bundle: Path) -> None:
    """For codes as they lie in the file there is no kernel: a token would take 75 times as long."""
    build(bundle, "ort-cpu-int4a8", "dense")
    off = {}
    for target in ("ort-cpu", "ort-cpu-int4a8"):
        with Session.open(bundle, "dense", target, low_memory=True) as session:
            options = session._runner.backends["dense"].sessions["decoder"].get_session_options()
            try:
                off[target] = options.get_session_config_entry("session.disable_prepacking")
            except RuntimeError:
                off[target] = None
    assert off == {"ort-cpu": "1", "ort-cpu-int4a8": None}
