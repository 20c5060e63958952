"""Engines that do not fit: the message names the field, both values and the command that builds anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_library import SYSTEM, VERSION, FakeLibrary, card, pretend, two_profiles

from trimvlm import Session, machine
from trimvlm.binding import check_engine, runs_on_version
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.target import PlanOptions
from trimvlm_engines import build as build_module
from trimvlm_engines import targets
from trimvlm_tools.cli import main


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with an engine of its profile `toy`, on a machine that it fits."""
    pretend(monkeypatch)
    monkeypatch.setattr(build_module, "open_library", FakeLibrary)
    bundle = two_profiles(tmp_path / "bundle")
    build_module.build(bundle, card(), "toy")
    return bundle


def test_what_an_engine_is_bound_to(built: Path) -> None:
    manifest = Bundle(built).manifest
    engine = manifest.profiles["toy"].engines["rtx-4090"]
    assert (engine.backend, engine.version, engine.compute_capability, engine.system) == (
        "tensorrt_rtx",
        VERSION,
        "8.9",
        SYSTEM,
    )
    assert engine.options["decoder"].keys() >= {"graph", "weights", "profile", "ranges", "tf32", "plan"}
    assert engine.options["decoder"]["plan"] == manifest.files[engine.graphs["decoder"]].sha256


@pytest.mark.parametrize(
    ("fact", "value", "said"),
    [
        (
            "library_version",
            "1.4.0.76",
            f"version of tensorrt_rtx is 1.4.0.76, but it was built for {VERSION}",
        ),
        ("system", "win32-x86_64", f"operating system is win32-x86_64, but it was built for {SYSTEM}"),
        ("compute_capability", "12.0", "GPU's SM is 12.0, but it was built for 8.9"),
        ("compute_capability", None, "GPU's SM is none, but it was built for 8.9"),
    ],
)
def test_another_machine(
    built: Path, monkeypatch: pytest.MonkeyPatch, fact: str, value: Any, said: str
) -> None:
    pretend(monkeypatch, **{fact: value})
    with pytest.raises(UserError) as caught:
        Session.open(built, "toy", "rtx-4090")
    assert said in str(caught.value)
    assert f"trimvlm build {built} --target rtx-4090 --profile toy" in str(caught.value)


@pytest.mark.parametrize(
    ("backend", "options", "built", "found", "runs"),
    [
        ("tensorrt", {}, "10.3.0", "10.3.0", True),
        ("tensorrt", {}, "10.3.0", "10.3.1", False),
        ("tensorrt", {"version_compatible": False}, "10.3.0", "10.4.0", False),
        ("tensorrt", {"version_compatible": True}, "10.3.0", "10.16.1.11", True),
        ("tensorrt", {"version_compatible": True}, "10.3.0", "10.3.0.30", True),
        ("tensorrt", {"version_compatible": True}, "10.16.1.11", "10.3.0", False),  # older
        ("tensorrt", {"version_compatible": True}, "10.3.0", "11.4.1", False),  # another major
        ("tensorrt_rtx", {"version_compatible": True}, "1.7.1.116", "1.8.0", False),
    ],
)
def test_which_version_runs_a_plan(
    backend: str, options: dict[str, bool], built: str, found: str, runs: bool
) -> None:
    assert runs_on_version(backend, built, found, options) is runs


def test_a_version_compatible_plan_opens_on_a_newer_minor_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = msgspec.structs.replace(
        targets.load("rtx-4090-tensorrt"), plan=PlanOptions(version_compatible=True), versions=">=10.16"
    )
    pretend(monkeypatch, library_version="10.16.1")
    monkeypatch.setattr(build_module, "open_library", lambda target: FakeLibrary(target, version="10.16.1"))
    bundle = two_profiles(tmp_path / "bundle")
    engine = build_module.build(bundle, target, "toy")
    for version, fits in (("10.16.1", True), ("10.17.0", True), ("10.15.0", False), ("11.0.0", False)):
        pretend(monkeypatch, library_version=version)
        if fits:
            check_engine(Bundle(bundle), "toy", engine)
        else:
            with pytest.raises(UserError, match=f"version of tensorrt is {version}, .* built for 10.16.1"):
                check_engine(Bundle(bundle), "toy", engine)


def test_a_plan_of_another_system_is_built_again(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, system="win32-x86_64")
    told: list[tuple[str, str]] = []
    build_module.build(built, card(), "toy", tell=lambda role, state: told.append((role, state)))
    assert ("decoder", "built") in told and ("vision", "built") in told
    assert Bundle(built).manifest.profiles["toy"].engines["rtx-4090"].system == "win32-x86_64"


def test_a_bit_in_a_plan_is_found_by_build_which_makes_it_anew(built: Path) -> None:
    plan = built / Bundle(built).manifest.profiles["toy"].engines["rtx-4090"].graphs["decoder"]
    data = bytearray(plan.read_bytes())
    data[100] ^= 4
    plan.write_bytes(data)
    told: list[tuple[str, str]] = []
    build_module.build(built, card(), "toy", tell=lambda role, state: told.append((role, state)))
    assert ("decoder", "built") in told
    Bundle(built).verify()


def test_build_refuses_damaged_weights(built: Path) -> None:
    weights = built / "checkpoint/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        build_module.build(built, card(), "other")


def test_verify_says_which_engines_fit(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(built), "--target", "rtx-4090"]) == 0
    assert "toy for rtx-4090: fits this machine" in capsys.readouterr().out
    pretend(monkeypatch, compute_capability="8.6")
    assert main(["verify", str(built)]) == 0  # the bundle is whole
    capsys.readouterr()
    assert main(["verify", str(built), "--target", "rtx-4090", "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["engines"]
    assert "GPU's SM is 8.6, but it was built for 8.9" in found["problem"]


def test_verify_names_every_damaged_file(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("vision.onnx", "toy.rtx-4090.decoder.engine"):
        data = bytearray((built / name).read_bytes())
        data[0] ^= 1
        (built / name).write_bytes(data)
    assert main(["verify", str(built), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["damaged"].keys() == {"vision.onnx", "toy.rtx-4090.decoder.engine"}
    rebuild = f"build it again with trimvlm build {built} --target rtx-4090 --profile toy"
    assert report["damaged"]["toy.rtx-4090.decoder.engine"] == rebuild


def test_verify_of_a_target_without_engines(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(built), "--target", "ort-cpu"]) == 2
    assert "no engine for target 'ort-cpu'; make one with trimvlm build" in capsys.readouterr().err


def test_versions_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert machine.library_version("tensorrt") == "10.3.0"
    assert machine.library_version("tensorrt_rtx") is None


def test_a_jetson_is_known_by_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    file = tmp_path / "nv_tegra_release"
    assert machine.system(file) == "linux-aarch64"
    file.write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n")
    assert machine.system(file) == "linux-aarch64-l4t36.4.3"
