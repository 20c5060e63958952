"""Targets: the shipped YAMLs, a user's own, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from trimvlm.errors import UserError
from trimvlm.target import Limits, Provider, Target, Tested
from trimvlm_engines import targets

FILES = sorted(targets.SHIPPED.glob("*.yaml"))

RTX: dict[str, Any] = {
    "name": "mine",
    "device": "a card",
    "system": "Linux",
    "backend": "tensorrt_rtx",
    "versions": ">=1.7,<2",
    "lowering": "fused",
    "dtypes": ("float16",),
    "compute_capability": "8.9",
    "source": "a datasheet",
}
CLASSIC = RTX | {"backend": "tensorrt", "versions": ">=10.16", "build_on_device": True}
CPU = RTX | {
    "backend": "onnxruntime",
    "provider": "CPUExecutionProvider",
    "versions": ">=1.24",
    "compute_capability": None,
}
JETSON = CLASSIC | {"l4t": ">=36.4.3,<37", "versions": ">=10.3,<10.4", "lowering": "primitive"}


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
        assert found[f"jetson-{name}"].runs_on("36.4.3") and found[f"jetson-{name}"].runs_on("36.5")
        assert found[f"jetson-{name}-jp7"].runs_on("39.2.1")
        assert not found[f"jetson-{name}-jp7"].runs_on("36.4.3")
    for name in ("jetson-thor-t4000", "jetson-thor-t5000", "h100", "h200"):
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
        classic = found[f"rtx-{name}-tensorrt"]
        assert (classic.backend, classic.compute_capability) == ("tensorrt", capability)
    providers = {name: found[name].provider for name in ("ort-cpu", "ort-cuda", "ort-trt-rtx")}
    assert list(providers.values()) == list(get_args(Provider))
    assert targets.DEFAULT in providers


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_target_has_every_figure_and_says_where_from(path: Path) -> None:
    target = targets.load(path.stem)
    missing = {field for field in ("memory_gb", "bandwidth_gb_s", "tflops") if getattr(target, field) is None}
    assert not missing or target.backend == "onnxruntime"
    if path.stem.startswith("jetson"):
        assert target.l4t and target.system.startswith("JetPack ")
        comments = [line for line in path.read_text().splitlines() if line.startswith("# ")]
        assert {line[2:].partition(":")[0] for line in comments} >= {"memory_gb", "bandwidth_gb_s", "tflops"}


def test_small_boards_split_what_they_cannot_allocate_in_one_piece() -> None:
    for target in targets.shipped():
        small = target.l4t is not None and (target.memory_gb or 0) < 8
        assert (target.limits.lm_head_columns is not None) == small
        assert (target.limits.allocation_mb is not None) == small
        if small:
            limits = target.limits
            assert limits.lm_head_columns and limits.allocation_mb
            assert limits.lm_head_columns * 4096 * 2 <= limits.allocation_mb * 2**20


def test_what_was_never_on_a_device_says_so() -> None:
    done = {
        target.name: {field for field in ("built", "run", "measured") if getattr(target.tested, field)}
        for target in targets.shipped()
    }
    assert {name for name, what in done.items() if "run" in what} == {"ort-cpu"}
    rtx = {target.name for target in targets.shipped() if target.backend == "tensorrt_rtx"}
    assert {name for name, what in done.items() if "built" in what} == rtx
    assert not any(what for name, what in done.items() if name.startswith("jetson"))


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
        ("limits: {topk: 4096}\n", "limits.topk: TensorRT's TopK takes at most 3840, not 4096"),
        ("limits: {lm_head_columns: 0}\n", "limits.lm_head_columns: 0 is not a positive count"),
        ("limits: [\n", "not a target"),
        ("provider: CPUExecutionProvider\n", "provider: a tensorrt_rtx target has no use for one"),
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
    assert [Target(**fields).name for fields in (RTX, CLASSIC, CPU, JETSON)] == ["mine"] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (RTX | {"name": "My Card"}, "name: 'My Card' cannot name files"),
        (RTX | {"versions": "1.7"}, "versions: '1.7' is not of the form"),
        (RTX | {"dtypes": ()}, "dtypes: name at least one"),
        (RTX | {"source": " "}, "source: say where"),
        (RTX | {"system": ""}, "system: say what it runs"),
        (RTX | {"memory_gb": 0.0}, "memory_gb: 0 is not positive; leave it out if it is unknown"),
        (RTX | {"tflops": -1.0}, "tflops: -1 is not positive"),
        (RTX | {"l4t": ">=39.2"}, "l4t: only classic TensorRT is built for Jetson, not tensorrt_rtx"),
        (JETSON | {"l4t": "36.4"}, "l4t: '36.4' is not of the form"),
        (CPU | {"provider": None}, "provider: an onnxruntime target names one of CPUExecutionProvider, CUDA"),
        (CPU | {"ranges": "split"}, "ranges: ONNX Runtime takes any shape"),
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


@pytest.mark.parametrize(
    ("l4t", "fields", "allowed"),
    [
        ("36.4.3", JETSON, True),
        ("36.3.0", JETSON, False),
        ("39.2.0", JETSON, False),
        (None, JETSON, False),
        ("36.4.3", CLASSIC, False),
        (None, CLASSIC, True),
    ],
)
def test_jetson_linux(l4t: str | None, fields: dict[str, Any], allowed: bool) -> None:
    assert Target(**fields).runs_on(l4t) is allowed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run": " "}, "tested.run: say what it was done with"),
        ({"measured": "a clock"}, "tested.measured: what never ran cannot have been measured"),
    ],
)
def test_claims_without_ground_are_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tested(**fields)


@pytest.mark.parametrize(("name", "extra"), [("ort-cuda", "ort-gpu"), ("ort-trt-rtx", "ort-rtx")])
def test_provider_that_would_silently_be_the_cpu_is_refused(name: str, extra: str) -> None:
    import onnxruntime

    from trimvlm_engines.library import open_library

    target = targets.load(name)
    if target.provider in onnxruntime.get_available_providers() or not target.allows(onnxruntime.__version__):
        pytest.skip("this ONNX Runtime has the provider, or is not one that the target takes")
    with pytest.raises(
        UserError,
        match=rf"{target.provider} is not in onnxruntime .*CPUExecutionProvider; .*trimvlm\[{extra}\]",
    ):
        open_library(target)


def test_targets_take_the_versions_that_ci_runs() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    found = [line.partition(";")[0].strip().split("==") for line in pins if "==" in line]
    versions = {name: [pin[1] for pin in found if pin[0] == name] for name in ("onnxruntime", "tensorrt_rtx")}
    assert all(versions.values())
    refused = [
        (target.name, version)
        for target in targets.shipped()
        if target.provider in (None, "CPUExecutionProvider")
        for version in versions.get(target.backend, [])
        if not target.allows(version)
    ]
    assert not refused
