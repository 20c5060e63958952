"""A third opinion: NVIDIA's Polygraphy runs every graph of a bundle on ONNX Runtime by itself, and compares.

On a tiny bundle whose profile has all kinds of graphs, and on the demo bundle.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from method_decisions import METHODS
from tiny_models import noise_image, tiny_llava
from tiny_router import random_router

from trimvlm.bundle import Bundle
from trimvlm.encoder_rules import EncoderStage, VisPruner
from trimvlm.errors import UserError
from trimvlm.profile import Decisions, Method, Profile, Select
from trimvlm.rules import RouterScores, ValueInfluence
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_tools.cli import main
from trimvlm_tools.demo_model import CHECKPOINT

pytest.importorskip("polygraphy")

DEMO = Path(__file__).parents[2] / "build/demo/bundle"
DECISIONS = Decisions(
    encoder=EncoderStage(keep=9, by=VisPruner(attention=1, features=1)),
    select=(
        Select(layer=0, keep=6, by=RouterScores()),
        Select(layer=2, keep=4, by=ValueInfluence(threshold=0.02)),
    ),
)


def polygraphy(graph: Path, files: Path) -> subprocess.CompletedProcess[str]:
    """`polygraphy run` as docs/jetson.md has it; `files` without their endings."""
    command = [Path(sys.executable).with_name("polygraphy"), "run", graph, "--onnxrt"]
    command += ["--load-inputs", f"{files}.inputs.json", "--load-outputs", f"{files}.outputs.json"]
    command += ["--atol", "1e-4", "--rtol", "1e-4"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def graphs(bundle: Path, profile: str) -> Iterator[tuple[str, Path]]:
    """Role and file of every graph that a profile has, the decoder in each lowering but the one whose caches
    are memory that Polygraphy cannot give it."""
    opened = Bundle(bundle)
    _, entry = opened.entry(profile)
    some = {"vision": entry.vision, "projector": entry.projector, "router": entry.router}
    yield from ((role, opened.path(file)) for role, file in some.items() if file)
    yield from (("decoder", opened.path(file)) for kind, file in entry.decoders.items() if kind != "in_place")


def agrees(bundle: Path, profile: str, folder: Path) -> int:
    """Asserts that Polygraphy passes every graph of a profile; how many there are."""
    found = list(graphs(bundle, profile))
    for role, graph in found:
        done = polygraphy(graph, folder / f"{profile}.{role}")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "PASSED" in done.stdout
    return len(found)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with goldens, and the folder of what Polygraphy reads."""
    root = tmp_path_factory.mktemp("polygraphy")
    checkpoint = tiny_llava(root / "model", layers=4)
    model = model_spec(checkpoint)
    router = random_router(root, model)
    profile = Profile(
        name="all", method=Method(name="by hand"), model=model, decisions=DECISIONS, router=router
    )
    export(checkpoint, profile, root / "bundle", beside=root)
    (root / "data").mkdir()
    noise_image(0).save(root / "data/0.png")
    question = {"image": "0.png", "question": "where is w3 ?"}
    (root / "data/questions.jsonl").write_text(json.dumps(question))
    check = ["check", str(root / "bundle")]
    assert main([*check, "--data", str(root / "data"), "--samples", "1", "--write-goldens"]) == 0
    assert main([*check, "--goldens", "--polygraphy", str(root / "files")]) == 0
    return root / "bundle", root / "files"


def test_every_kind_of_graph(written: tuple[Path, Path]) -> None:
    bundle, folder = written
    assert {role for role, _ in graphs(bundle, "all")} == {"vision", "projector", "router", "decoder"}
    assert agrees(bundle, "all", folder) == 5


def test_another_output_fails(written: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, folder = written
    for end in ("inputs", "outputs"):
        shutil.copy(folder / f"all.router.{end}.json", tmp_path / f"changed.{end}.json")
    inputs = tmp_path / "changed.inputs.json"
    from polygraphy.json import load_json, save_json

    feeds = load_json(str(inputs))
    feeds[0]["visual"] = feeds[0]["visual"] + 1
    save_json(feeds, str(inputs))
    (graph,) = (graph for role, graph in graphs(bundle, "all") if role == "router")
    done = polygraphy(graph, tmp_path / "changed")
    assert done.returncode == 1 and "FAILED" in done.stdout


def test_what_is_refused(written: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle, folder = written
    assert main(["check", str(bundle), "--polygraphy", str(folder)]) == 2
    assert "--polygraphy: goes with --goldens" in capsys.readouterr().err


def demo_bundle(out: Path) -> Path:
    """A copy of what `make demo` has made, or the demo model with the same methods, not calibrated."""
    try:
        Bundle(DEMO)
        return Path(shutil.copytree(DEMO, out))
    except UserError:
        for name, decisions in METHODS.items():
            model = model_spec(CHECKPOINT)
            export(
                CHECKPOINT,
                Profile(name=name, method=Method(name=name), model=model, decisions=decisions),
                out,
            )
        return out


@pytest.mark.slow
def test_the_demo_bundle(tmp_path: Path) -> None:
    bundle = demo_bundle(tmp_path / "bundle")
    assert set(Bundle(bundle).manifest.profiles) == set(METHODS)
    check = ["check", str(bundle)]
    assert main([*check, "--samples", "1", "--max-new-tokens", "3", "--write-goldens"]) == 0
    assert main([*check, "--goldens", "--polygraphy", str(tmp_path / "files")]) == 0
    for profile in Bundle(bundle).manifest.profiles:
        assert agrees(bundle, profile, tmp_path / "files") >= 3
