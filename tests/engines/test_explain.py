"""`build --explain`: its commands ask for the very ranges that a build would."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from fake_library import two_profiles

from trimvlm import machine
from trimvlm.bundle import Bundle, record, write_manifest
from trimvlm.errors import UserError
from trimvlm.manifest import read_manifest
from trimvlm.target import PlanOptions, Target
from trimvlm_engines import targets
from trimvlm_engines.explain import Command, explain
from trimvlm_engines.parts import parts
from trimvlm_tools.cli import main

CARD, CLASSIC = "rtx-4090", "rtx-4090-tensorrt"
# https://docs.nvidia.com/deeplearning/tensorrt, "Migrating trtexec Usage from TensorRT 10.x to 11.x"
REMOVED_IN_11 = {"--fp16", "--bf16", "--int8", "--fp8", "--int4", "--best", "--calib", "--stronglyTyped"}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Its directory has a space and a quote in its name."""
    return two_profiles(tmp_path / "a bundle's")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is installed."""
    monkeypatch.setattr(machine, "library_version", lambda backend: None)


def in_a_shell(command: Command) -> list[str]:
    """The words that the tool is called with when the text is pasted into a shell."""
    script = f'{command.tool}() {{ printf "%s\\0" "$@"; }}\n{command.text()}\n'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def trtexec_ranges(words: list[str]) -> list[dict[str, list[list[int]]]]:
    """Ranges by input, one set for each `--profile`, as trtexec reads them."""
    sets: list[dict[str, list[list[int]]]] = []
    for word in words:
        if word.startswith("--profile=") and word != "--profile=0":
            sets.append({})
        if found := re.fullmatch(r"--(min|opt|max)Shapes=(.+)", word):
            sets = sets or [{}]
            for pair in found[2].split(","):
                name, shape = pair.rsplit(":", 1)
                sets[-1].setdefault(name, []).append([int(size) for size in shape.split("x")])
    return sets


def polygraphy_ranges(words: list[str], rtx: bool) -> list[dict[str, list[list[int]]]]:
    """The same as Polygraphy's own parser reads them; it exits where it does not know an option."""
    from polygraphy import config
    from polygraphy.tools.args import TrtConfigArgs
    from polygraphy.tools.convert.convert import Convert

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "USE_TENSORRT_RTX", rtx)  # the variable of the environment, read at import
        tool = Convert()
        args = tool.setup_parser().parse_args(words)
        for group in tool.arg_groups.values():
            group.parse(args)
    found = tool.arg_groups[TrtConfigArgs].profile_dicts
    return [{name: [list(shape) for shape in shapes] for name, shapes in one.items()} for one in found]


def wanted_ranges(bundle: Path, target: Target) -> dict[str, list[dict[str, Any]]]:
    opened = Bundle(bundle)
    return {
        role: [
            {name: shape.plain() for name, shape in ranges.items()} for ranges in part.phases or [part.ranges]
        ]
        for role, part in parts(opened, *opened.entry("toy"), target).items()
    }


@pytest.mark.parametrize("strategy", ["joint", "split"])
@pytest.mark.parametrize("name", [CARD, CLASSIC])
def test_shapes_are_those_of_the_build(bundle: Path, name: str, strategy: str, elsewhere: None) -> None:
    target = msgspec.structs.replace(targets.load(name), ranges=strategy)
    commands = explain(bundle, target, "toy")
    own = "tensorrt_rtx" if name == CARD else "trtexec"
    assert [(each.role, each.tool) for each in commands] == [
        (role, tool) for role in ("vision", "decoder") for tool in (own, "polygraphy")
    ]
    wanted = wanted_ranges(bundle, target)
    for command in commands:
        words = in_a_shell(command)
        found = trtexec_ranges(words) if command.tool == own else polygraphy_ranges(words[1:], name == CARD)
        assert found == wanted[command.role]
        assert len(found) == (2 if (strategy, command.role) == ("split", "decoder") else 1)


def test_words_of_a_card(bundle: Path, elsewhere: None) -> None:
    own, polygraphy = explain(bundle, CARD, "toy")[:2]
    words = in_a_shell(own)
    assert words[:4] == [
        f"--onnx={bundle}/vision.onnx",
        "--saveEngine=vision.rtx-4090.engine",
        "--skipInference",
        "--computeCapabilities=89",
    ]
    assert polygraphy.argv[0] == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    assert in_a_shell(polygraphy)[1] == f"{bundle}/vision.onnx"


@pytest.mark.parametrize(("version", "asked"), [("10.16.1.11", True), ("11.4.0.106", False), (None, True)])
def test_no_flag_that_a_version_has_lost(
    bundle: Path, version: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not installed: the oldest version that the target allows."""
    monkeypatch.setattr(machine, "library_version", lambda backend: version)
    words = {word.partition("=")[0] for word in in_a_shell(explain(bundle, CLASSIC, "toy")[0])}
    assert ("--stronglyTyped" in words) is asked
    assert not words & (REMOVED_IN_11 - {"--stronglyTyped"})
    assert "--noTF32" in words and "--computeCapabilities" not in words


@pytest.mark.parametrize(
    ("plan", "own", "polygraphys"),
    [
        (PlanOptions(version_compatible=True), "--versionCompatible", "--version-compatible"),
        (PlanOptions(stripped=True), "--stripWeights", "--strip-plan"),
    ],
)
def test_plan_options(bundle: Path, plan: PlanOptions, own: str, polygraphys: str, elsewhere: None) -> None:
    plain = explain(bundle, CLASSIC, "toy")
    chosen = explain(bundle, msgspec.structs.replace(targets.load(CLASSIC), plan=plan), "toy")
    for before, after in zip(plain, chosen, strict=True):
        (new,) = set(after.argv) - set(before.argv)
        assert new == (polygraphys if after.tool == "polygraphy" else own)


def test_a_graph_without_dynamic_inputs_gets_no_shapes(bundle: Path, elsewhere: None) -> None:
    """trtexec: "Static model does not take explicit shapes"."""
    model = onnx.load(bundle / "vision.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, bundle / "vision.onnx")
    manifest = read_manifest(bundle)
    files = {**manifest.files, "vision.onnx": record(bundle / "vision.onnx")}
    write_manifest(bundle, msgspec.structs.replace(manifest, files=files))
    assert not [word for word in explain(bundle, CLASSIC, "toy")[0].argv if "Shapes" in word]


def test_onnx_runtime_has_nothing_to_explain(bundle: Path) -> None:
    with pytest.raises(UserError, match="target ort-cpu: ONNX Runtime runs the graphs as they are"):
        explain(bundle, "ort-cpu", "toy")


def test_the_verb_builds_nothing(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if ".lock" not in path.name}
    assert main(["build", str(bundle), "--target", CLASSIC, "--explain"]) == 0
    text = capsys.readouterr().out
    assert text.count("trtexec \\\n") == 4 and text.count("polygraphy convert") == 4
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert main(["build", str(bundle), "--target", CLASSIC, "--explain", "--profile", "other", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [each["role"] for each in report["commands"]] == ["vision", "vision", "decoder", "decoder"]
    after = {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if ".lock" not in path.name}
    assert after == before
