"""Classic TensorRT where it is not installed, and what of its builder needs no device.

Its plans are not built here: they need the device. A fake module stands for each version's names
(tests/fake_trt.py); what the builder shares with TensorRT-RTX is tested there.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fake_library import two_profiles
from fake_trt import NAMES, fake_tensorrt

from trimvlm import machine
from trimvlm.bundle import Bundle, write_manifest
from trimvlm.errors import UserError
from trimvlm.target import PlanOptions, Target
from trimvlm_engines import targets, versions
from trimvlm_engines.build import build
from trimvlm_engines.tensorrt_classic import TensorRt

ORIN = "jetson-orin-nano-8gb"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The toy bundle, its decoder given out as primitive too: nothing looks inside it here."""
    directory = two_profiles(tmp_path / "bundle")
    manifest = Bundle(directory).manifest
    profiles = {
        name: msgspec.structs.replace(
            entry, decoders=dict.fromkeys(("fused", "primitive"), entry.decoders["fused"])
        )
        for name, entry in manifest.profiles.items()
    }
    write_manifest(directory, msgspec.structs.replace(manifest, profiles=profiles))
    return directory


def test_not_installed(
    bundle: Path, contents: Callable[[], dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    before = contents()
    with pytest.raises(
        UserError, match=f"target {ORIN}: tensorrt is not installed, .* comes with JetPack .* index"
    ) as caught:
        build(bundle, ORIN, "toy")
    assert "\n" not in str(caught.value)
    assert contents() == before


@pytest.mark.parametrize(
    ("version", "found", "message"),
    [
        ("10.16.1.11", "8.7", r"tensorrt 10.16.1.11 is installed, but it takes >=10.3,<10.4"),
        (
            "10.3.0.30",
            None,
            r"built on the device \(SM 8.7\), but this machine has no GPU; copy the bundle there",
        ),
        ("10.3.0.30", "8.9", r"built on the device \(SM 8.7\), but this machine has a GPU of SM 8.9"),
    ],
)
def test_wrong_version_or_device(
    monkeypatch: pytest.MonkeyPatch, version: str, found: str | None, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    monkeypatch.setattr(machine, "compute_capability", lambda: found)
    with pytest.raises(UserError, match=message):
        TensorRt(targets.load(ORIN))


def test_machine_without_a_driver_has_no_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(machine.ctypes, "CDLL", missing)
    assert machine.compute_capability() is None


VERSIONS = ["10.3.0", "10.7.0", "10.16.1.11", "11.4.0.106"]


def board(version: str, **changes: Any) -> Target:
    """An Orin whose TensorRT is of this version."""
    return msgspec.structs.replace(targets.load(ORIN), versions=f">={version}", **changes)


def built_with(
    target: Target, version: str, directory: Path, patch: pytest.MonkeyPatch, **watching: Any
) -> dict[str, Any]:
    """Builds `toy` with a fake TensorRT; returns what its decoder was asked to be."""
    patch.setitem(sys.modules, "tensorrt", fake_tensorrt(version))
    patch.setattr(machine, "compute_capability", lambda: "8.7")
    patch.setenv("XDG_CACHE_HOME", str(directory.parent / "cache"))
    engine = build(directory, target, "toy", **watching)
    assert engine.version == version
    return json.loads((directory / engine.graphs["decoder"]).read_bytes())


@pytest.mark.parametrize("version", VERSIONS)
def test_one_builder_for_every_version(version: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = built_with(board(version), version, bundle, monkeypatch)
    assert plan["typed"] and plan["flags"] == []  # strongly typed, TF32 off
    (ranges,) = plan["profiles"]
    assert ranges["visual"][2][0] == 4 and ranges["input_ids"] == [[1], [32], [512]]
    (times,) = (bundle.parent / "cache/trimvlm/timing").glob(f"tensorrt-{version}-sm8.7.cache")
    assert b"kernel of vision.onnx" in times.read_bytes() and b"toy.decoder" in times.read_bytes()


def test_split_ranges_and_options_reach_the_builder(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = board("10.3.0", ranges="split", plan=PlanOptions(stripped=True))
    plan = built_with(target, "10.3.0", bundle, monkeypatch)
    assert plan["flags"] == ["REFIT_IDENTICAL", "STRIP_PLAN"]
    prefill, decode = plan["profiles"]
    assert prefill["past_key.0"][2][2] == 0 < decode["past_key.0"][2][2]
    assert decode["input_ids"] == [[1], [1], [1]] and prefill["input_ids"][2] == [512]


def test_other_plan_options_make_plans_stale(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    def tell(*pair: str) -> None:
        told.append(pair)  # type: ignore[arg-type]

    built_with(board("10.3.0"), "10.3.0", bundle, monkeypatch)
    for change in ({"plan": PlanOptions(version_compatible=True)}, {"ranges": "split"}, {}):
        for state in ("built", "up to date"):
            told.clear()
            built_with(board("10.3.0", **change), "10.3.0", bundle, monkeypatch, tell=tell)
            assert told[-1] == ("decoder", state)


def test_a_version_compatible_plan_stays_when_the_library_is_updated(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = msgspec.structs.replace(
        targets.load(ORIN), versions=">=10.3", plan=PlanOptions(version_compatible=True)
    )
    built_with(target, "10.3.0", bundle, monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.7.0"))
    assert build(bundle, target, "toy").version == "10.3.0"  # kept
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("11.4.0.106"))
    assert build(bundle, target, "toy").version == "11.4.0.106"  # built again
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt("10.7.0"))
    assert build(bundle, target, "toy").version == "10.7.0"  # nor does an older one run it


def test_the_builder_uses_only_names_that_every_version_has() -> None:
    """What some lack is in `versions`, where it is looked for before it is used."""
    source = Path(versions.__file__).parent
    for name in ("plan", "progress", "timing_cache", "tensorrt_classic"):
        tree = ast.parse((source / f"{name}.py").read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for version, missing in NAMES["missing"].items():
            assert not used & set(missing), f"{name}.py: not in TensorRT {version}"
    asked = {
        node.attr
        for node in ast.walk(ast.parse(Path(versions.__file__).read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert asked & set(NAMES["everywhere"]) and asked & set(NAMES["missing"]["10.3.0"])
