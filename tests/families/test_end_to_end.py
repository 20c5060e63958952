"""Every family through the command line: a checkpoint as a user has it, exported with profiles of every kind,
checked against Hugging Face; then conversations of two images and two turns through the runtime.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from operator_list import refused
from PIL import Image
from skimage import data
from tiny_mobilevlm import tiny_mobilevlm
from tiny_models import tiny_llava
from tiny_qwen import tiny_qwen
from tiny_tiled import tiny_internvl, tiny_next, tiny_onevision

from trimvlm.accounting import kv_bytes_per_layer
from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, HiPrune
from trimvlm.profile import Decisions, Grid, LayerRule, Method, Profile, Select
from trimvlm.rules import LastRowAttention
from trimvlm.schedule import resolve
from trimvlm.session import Session
from trimvlm.text import Turn
from trimvlm_calib.files import save_profile
from trimvlm_calib.samples import load_samples
from trimvlm_engines.build import build
from trimvlm_export import families
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.loading import Preparation, load_model
from trimvlm_export.processing import image_processing
from trimvlm_export.reference import Reference
from trimvlm_tools.cli import main
from trimvlm_tools.parity.check import HuggingFace, check
from trimvlm_tools.parity.quantized import quantized

TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A family: how to make a checkpoint, the size of its images, and the budget of its encoder stage."""

    make: Callable[..., Path]
    size: tuple[int, int] = (150, 113)
    keep: int = 6
    several: tuple[int, int] | None = None


CASES = {
    "llava": Case(lambda path: tiny_llava(path, layers=3)),
    "llava_next": Case(lambda path: tiny_next(path, shard="60KB"), keep=10),
    "llava_onevision": Case(lambda path: tiny_onevision(path, shard="60KB"), keep=10),
    "internvl": Case(lambda path: tiny_internvl(path, shard="60KB"), keep=14),
    "qwen2_vl": Case(lambda path: tiny_qwen(path, "qwen2_vl", layers=3, tie=True, shard="60KB")),
    "qwen2_5_vl": Case(lambda path: tiny_qwen(path, "qwen2_5_vl", layers=3, old_names=False)),
    "mobilevlm": Case(lambda path: tiny_mobilevlm(path, layers=3, shards=2), keep=24),
}


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CASES[family].make(tmp_path_factory.mktemp(family) / "model")


@pytest.fixture(scope="module")
def photographs(checkpoint: Path, family: str) -> list[Path]:
    """One of the size that the profiles are for, one that has to be made to fit."""
    directory = checkpoint.parent / "data"
    directory.mkdir()
    pictures = [
        Image.fromarray(data.astronaut()).resize(CASES[family].size),
        Image.fromarray(data.coffee()).resize((201, 97)),
    ]
    lines = []
    for number, picture in enumerate(pictures):
        picture.save(directory / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": f"what is the color of w{number} ?"}))
    (directory / "questions.jsonl").write_text("\n".join(lines))
    return [directory / f"{number}.png" for number in range(len(pictures))]


def decisions(keep: int) -> dict[str, Decisions]:
    return {
        "fastv": Decisions(select=(Select(layer=1, keep=3, by=LastRowAttention(attention="previous")),)),
        "v-skip": Decisions(layers=(LayerRule(layers=(1,), query="none"),)),
        "late": Decisions(inject=1, exit=2),
        "hiprune": Decisions(
            encoder=EncoderStage(keep=keep, by=HiPrune(alpha=0.5, object_layer=0, deep_layer=1))
        ),
    }


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, family: str) -> Path:
    """Dense and the four, exported by the command line."""
    case, out = CASES[family], checkpoint.parent / "bundle"
    size = (
        []
        if image_processing(checkpoint).__class__.__name__ == "SingleView"
        else ["--image-size", "{}x{}".format(*case.size)]
    )
    assert main(["export", str(checkpoint), "--out", str(out), *size]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    ((name, entry),) = manifest["profiles"].items()
    assert name.partition("@")[0] == "dense"
    grid = entry["model"]["grid"] and tuple(entry["model"]["grid"])
    files = []
    for each, made in decisions(case.keep).items():
        profile = Profile(
            name=each, method=Method(name=each), model=model_spec(checkpoint, grid), decisions=made
        )
        files.append(checkpoint.parent / f"{each}.yaml")
        save_profile(profile, files[-1])
    options = [option for file in files for option in ("--profile", str(file))]
    assert main(["export", str(checkpoint), "--out", str(out), *options]) == 0
    return out


def test_tensorrt_10_3_knows_every_operator(bundle: Path) -> None:
    for entry in Bundle(bundle).manifest.profiles.values():
        for file in filter(None, (entry.decoders["primitive"], entry.vision, entry.projector)):
            assert refused(bundle / file) == [], file


def test_checked_by_the_command_line(
    bundle: Path, photographs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", str(bundle), "--data", str(photographs[0].parent), "--samples", "2", "--json"]
    code = main([*arguments, "--max-new-tokens", str(TOKENS)])
    reports = json.loads(capsys.readouterr().out)
    bad = {
        (report["profile"], rung["name"], metric["name"]): metric["value"]
        for report in reports
        for rung in report["rungs"]
        for metric in rung["metrics"]
        if metric["limit"] is not None and not metric["value"] <= metric["limit"]
    }
    assert bad == {} and code == 0
    assert len(reports) == 5


@pytest.mark.parametrize("kind", ["dense", "hiprune"])
def test_a_quantised_tower_and_its_reference(bundle: Path, photographs: list[Path], kind: str) -> None:
    """Int8 activations: every matrix that the tower and the projector multiply with is quantised, and is so
    in the Hugging Face model too, which sees the same."""
    (name,) = (each for each in Bundle(bundle).manifest.profiles if each.partition("@")[0] == kind)
    build(bundle, "ort-cpu-int4a8x128", name)
    opened = Bundle(bundle)
    entry = opened.entry(name)[1]
    hf = HuggingFace(opened, entry.model.grid, quantized(entry, "ort-cpu-int4a8x128"))
    plain = dict(HuggingFace(opened, entry.model.grid).model.named_parameters())
    prefix = families.of(hf.model.config.model_type).DECODER_PREFIX
    rounded = {
        each
        for each, values in hf.model.named_parameters()
        if not each.startswith((prefix, "lm_head")) and not torch.equal(values, plain[each])
    }
    graphs = [
        onnx.load(str(bundle / each), load_external_data=False)
        for each in (entry.vision, entry.projector)
        if each
    ]
    stored = {tensor.name for graph in graphs for tensor in graph.graph.initializer if tensor.external_data}
    read = {node.input[1] for graph in graphs for node in graph.graph.node if node.op_type == "Gemm"}
    assert len(rounded) == len(stored & read) > 6
    report = check(
        opened, name, load_samples(photographs[0].parent), data="photographs", max_new_tokens=1, hf=hf,
        target="ort-cpu-int4a8x128",
    )  # fmt: skip
    (rung,) = (rung for rung in report.rungs if "free running" in rung.name)
    (visual,) = (each for each in rung.metrics if each.name.startswith("vision features") and each.limit)
    assert visual.verdict != "FAIL" and visual.value > 1e-4


def test_two_images_and_two_turns(
    bundle: Path, checkpoint: Path, photographs: list[Path], family: str
) -> None:
    """The prompt is the chat template's, and the answers are those of the model and of the reference."""
    history = [Turn(text="what is w3 ?", images=1, answer="w9 w4")]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is w3 ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w9 w4"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many w7 ?"}]},
    ]
    model = load_model(checkpoint)
    with Session.open(bundle, "dense") as session:
        grid = session.model.grid
        inputs = prepared(checkpoint, grid, photographs, messages)
        with torch.no_grad():
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        wanted = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert generated(session, photographs, history) == wanted
    for name, made in decisions(CASES[family].keep).items():
        schedule = resolve(made, model_spec(checkpoint, grid))
        with Reference(model, schedule, made.encoder) as reference:
            wanted = reference.generate(inputs, TOKENS)
        with Session.open(bundle, name) as session:
            assert generated(session, photographs, history) == wanted, name


def test_kv_bytes_are_what_the_schedule_says(bundle: Path, photographs: list[Path], family: str) -> None:
    for name, made in decisions(CASES[family].keep).items():
        with Session.open(bundle, name) as session:
            prompt, seen = session.prompt("how many w7 ?", 1), session.visual(photographs[:1])
            outputs = session.prefill(prompt, seen.rows, patches=seen.chosen)
            found = [
                sum(outputs[f"present_{kind}.{layer}"].nbytes for kind in ("key", "value"))
                for layer in range(session.model.layers)
            ]
            schedule, text = resolve(made, session.model), len(prompt.input_ids)
        assert found == list(kv_bytes_per_layer(schedule, text, 4)), name


def prepared(
    checkpoint: Path, grid: Grid | None, images: list[Path], messages: list[dict[str, Any]]
) -> dict[str, Any]:
    prepare = Preparation(checkpoint, grid)
    prompt = prepare.processor.apply_chat_template(messages, add_generation_prompt=True)
    return prepare(images, prompt)


def generated(session: Session, images: list[Path], history: list[Turn]) -> list[int]:
    """Greedy ids, the end token included where it was reached."""
    prompt = session.prompt("how many w7 ?", 2, history=history)
    seen = session.visual(images)
    outputs = session.prefill(prompt, seen.rows, patches=seen.chosen)
    ids: list[int] = []
    while len(ids) < TOKENS:
        if ids:
            outputs = session.step(ids[-1], outputs)
        ids.append(int(np.argmax(outputs["logits"][0])))
        if ids[-1] in session.bundle.manifest.text.eos_ids:
            break
    return ids
