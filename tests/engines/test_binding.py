"""Engines that do not fit: the message names the field, both values and the command that builds anew."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_library import SYSTEM, VERSION, FakeLibrary, card, pretend, two_profiles

from trimvlm import Session, machine
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm_engines import build as build_module
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
