"""Targets: the shipped YAMLs, a user's own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimvlm.errors import UserError
from trimvlm.target import Limits, Target
from trimvlm_engines import targets

FILES = sorted(targets.SHIPPED.glob("*.yaml"))

RTX: dict[str, Any] = {
    "name": "mine",
    "device": "a card",
    "backend": "tensorrt_rtx",
    "versions": ">=1.7,<2",
    "lowering": "fused",
    "dtypes": ("float16",),
    "compute_capability": "8.9",
    "tested": "not yet run",
    "source": "a datasheet",
}
CLASSIC = RTX | {"backend": "tensorrt", "versions": ">=10.16", "build_on_device": True}
CPU = RTX | {"backend": "onnxruntime", "versions": ">=1.24", "compute_capability": None}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_target_loads_under_its_file_name(path: Path) -> None:
    assert targets.load(path.stem).name == path.stem


def test_the_promised_devices_are_there() -> None:
    found = {target.name: target for target in targets.shipped()}
    orins = (
        "orin-nano-4gb",
        "orin-nano-8gb",
        "orin-nx-8gb",
        "orin-nx-16gb",
        "agx-orin-32gb",
        "agx-orin-64gb",
    )
    for name in orins:
        assert found[f"jetson-{name}"].allows("10.3.0.30")
        assert found[f"jetson-{name}"].lowering == "primitive"
        assert found[f"jetson-{name}-jp7"].allows("10.16.1.11")
        assert found[f"jetson-{name}-jp7"].lowering == "fused"
    for name in ("jetson-thor-t4000", "jetson-thor-t5000", "h100", "h200", "rtx-4090-tensorrt"):
        assert found[name].backend == "tensorrt"
    for name, capability in (
        ("3060", "8.6"),
        ("3090", "8.6"),
        ("4070", "8.9"),
        ("4090", "8.9"),
        ("5090", "12.0"),
    ):
        assert (found[f"rtx-{name}"].backend, found[f"rtx-{name}"].compute_capability) == (
            "tensorrt_rtx",
            capability,
        )
    assert found[targets.DEFAULT].backend == "onnxruntime"


def test_what_was_never_on_a_device_says_so() -> None:
    claims = {target.backend: set() for target in targets.shipped()}
    for target in targets.shipped():
        claims[target.backend].add(target.tested)
    assert claims == {"onnxruntime": {"run"}, "tensorrt_rtx": {"built"}, "tensorrt": {"not yet run"}}


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UserError, match=r"no target 'rtx4090'; did you mean rtx-4090\? known are h100, h200, .*ort-cpu"
    ):
        targets.load("rtx4090")


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "desk.yaml"
    path.write_text(
        (targets.SHIPPED / "rtx-4090.yaml").read_text().replace("rtx-4090", "desk") + "limits: {images: 7}\n"
    )
    target = targets.load(path)
    assert (target.name, target.limits) == ("desk", Limits(images=7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("memory: 24\n", "unknown field `memory`"),
        ("limits: {image: 2}\n", r"unknown field `image` - at `\$\.limits`"),
        ("limits: {images: 0}\n", "limits.images: 0 is not a positive count"),
        ("limits: [\n", "not a target"),
    ],
)
def test_own_file_with_a_mistake(tmp_path: Path, change: str, message: str) -> None:
    path = tmp_path / "desk.yaml"
    path.write_text((targets.SHIPPED / "rtx-4090.yaml").read_text() + change)
    with pytest.raises(UserError, match=message) as caught:
        targets.load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_own_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such target file"):
        targets.load(tmp_path / "none.yaml")


def test_the_examples_below_are_possible() -> None:
    assert [Target(**fields).name for fields in (RTX, CLASSIC, CPU)] == ["mine"] * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (RTX | {"name": "My Card"}, "name: 'My Card' cannot name files"),
        (RTX | {"versions": "1.7"}, "versions: '1.7' is not of the form"),
        (RTX | {"dtypes": ()}, "dtypes: name at least one"),
        (RTX | {"source": " "}, "source: say where"),
        (RTX | {"compute_capability": None}, "compute_capability: a tensorrt_rtx target needs one"),
        (
            RTX | {"compute_capability": "9.0"},
            r"TensorRT-RTX runs on .*12\.0.*, not on 9\.0; use backend tensorrt",
        ),
        (RTX | {"compute_capability": "8.7"}, "not on 8.7"),
        (
            RTX | {"build_on_device": True},
            "build_on_device: a tensorrt_rtx target is not built on the device",
        ),
        (
            CLASSIC | {"build_on_device": False},
            "build_on_device: a tensorrt target must be built on the device",
        ),
        (CLASSIC | {"versions": ">=10.3,<10.4"}, "lowering: fused needs TensorRT 10.15 or newer"),
        (CLASSIC | {"versions": "<11"}, "lowering: fused needs TensorRT 10.15 or newer"),
        (CPU | {"compute_capability": "8.9"}, "compute_capability: a onnxruntime target has no use for one"),
    ],
)
def test_impossible_targets_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Target(**fields)


@pytest.mark.parametrize(
    ("versions", "version", "allowed"),
    [
        (">=10.3,<10.4", "10.3.0.30", True),
        (">=10.3,<10.4", "10.4.0", False),
        (">=10.3,<10.4", "10.13.3.9", False),  # 13 is more than 3, whatever the text order says
        (">=10.16,<12", "11.4.1", True),
        (">=1.24,<2", "1.24.0rc1", True),
        (">=1.24,<2", "1.9.0+cpu", False),
    ],
)
def test_versions(versions: str, version: str, allowed: bool) -> None:
    assert Target(**CPU | {"versions": versions}).allows(version) is allowed


def test_targets_take_the_versions_that_ci_runs() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    found = [line.partition(";")[0].strip().split("==") for line in pins if "==" in line]
    versions = {name: [pin[1] for pin in found if pin[0] == name] for name in ("onnxruntime", "tensorrt_rtx")}
    assert all(versions.values())
    refused = [
        (target.name, version)
        for target in targets.shipped()
        for version in versions.get(target.backend, [])
        if not target.allows(version)
    ]
    assert not refused
