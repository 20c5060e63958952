"""`trimvlm doctor` on file trees of boards and a desktop. No Jetson was at hand: the trees follow what is
published of such boards (release lines, device trees, power modes), cut to what is read."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trimvlm_engines import targets
from trimvlm_tools.cli import main
from trimvlm_tools.doctor.board import Check
from trimvlm_tools.doctor.checks import diagnose
from trimvlm_tools.doctor.facts import Facts, Process, read, this_process

WHEELS = {name: "1.0" for name in ("numpy", "msgspec", "tokenizers", "pillow", "pyyaml", "filelock", "onnx")}
PACKAGE = "Package: {}\nStatus: install ok installed\nVersion: {}\n"


def process(**changes: Any) -> Process:
    seen = {
        "machine": "aarch64",
        "python": "3.10.12",
        "virtual_environment": True,
        "versions": WHEELS,
        "compute_capability": "8.7",
    }
    return Process(**seen | changes)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def board(
    root: Path, *, release: str, python: str, cuda: str, packages: str, chip: str, model: str, kb: int
) -> Path:
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/python3").symlink_to(f"python{python}")
    major, _, minor = release.partition(".")
    return write(
        root,
        {
            "etc/nv_tegra_release": f"# R{major} (release), REVISION: {minor}, GCID: 1, BOARD: generic\n",
            "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
            "etc/nvpmodel.conf": "# modes\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
            "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
            "var/lib/nvpmodel/status": "pmode:0001",
            "proc/device-tree/model": model + "\0",
            "proc/device-tree/compatible": f"nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0{chip}\0",
            "proc/meminfo": f"MemTotal:  {kb} kB\nMemFree: 1 kB\nMemAvailable: {kb * 3 // 4} kB\n"
            "SwapTotal: 3901000 kB\nCmaTotal:  262144 kB\nCmaFree: 200000 kB\n",
            "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 650000 0 5\n",
            "usr/local/cuda/version.json": json.dumps({"cuda": {"name": "CUDA SDK", "version": cuda}}),
            "var/lib/dpkg/status": packages,
        },
    )


@pytest.fixture
def jetpack6(tmp_path: Path) -> Path:
    packages = (
        ("nvidia-jetpack", "6.2.1+b38"),
        ("libnvinfer10", "10.3.0.30-1+cuda12.5"),
        ("python3-libnvinfer", "10.3.0.30-1+cuda12.5"),
    )
    return board(
        tmp_path / "jetpack6",
        release="36.4.4",
        python="3.10",
        cuda="12.6.68",
        packages="\n".join(PACKAGE.format(*package) for package in packages),
        chip="nvidia,tegra234",
        model="NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        kb=7802880,
    )


@pytest.fixture
def jetpack7(tmp_path: Path) -> Path:
    packages = (
        ("nvidia-jetpack", "7.2-b1"),
        ("libnvinfer10", "10.16.1.11-1+cuda13.2"),
        ("python3-libnvinfer", "10.16.1.11-1+cuda13.2"),
    )
    return board(
        tmp_path / "jetpack7",
        release="39.2.0",
        python="3.12",
        cuda="13.2.0",
        packages="\n".join(PACKAGE.format(*package) for package in packages),
        chip="nvidia,tegra264",
        model="NVIDIA Jetson AGX Thor Developer Kit",
        kb=128790100,
    )


@pytest.fixture
def desktop(tmp_path: Path) -> Path:
    return write(
        tmp_path / "desktop",
        {
            "etc/os-release": 'PRETTY_NAME="Ubuntu 24.04 LTS"\n',
            "proc/meminfo": "MemTotal: 32000000 kB\nMemAvailable: 30000000 kB\nSwapTotal: 0 kB\n",
            "sys/module/nvidia/version": "580.95.05\n",
        },
    )


def checked(facts: Facts, target: str | None = None) -> dict[str, Check]:
    wanted = targets.load(target) if target else None
    return {check.name: check for check in diagnose(facts, targets.shipped(), wanted)}


def test_jetpack6_ready_but_for_what_makes_it_slow(jetpack6: Path) -> None:
    seen = process(
        versions=WHEELS | {"tensorrt": "10.3.0", "cuda-bindings": "12.9.4", "onnxruntime": "1.23.2"}
    )
    facts = read(jetpack6, seen)
    assert (facts.l4t, facts.jetpack, facts.tensorrt, facts.cuda) == (
        "36.4.4",
        "6.2.1",
        "10.3.0.30",
        "12.6.68",
    )
    assert (facts.memory, facts.swap_disk, facts.swap_zram) == (7802880 * 1024, 0, 650000 * 1024)
    assert facts.power_modes == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
    found = checked(facts)
    assert {name for name, check in found.items() if check.state == "warn"} == {"swap", "power"}
    others = {check.state for name, check in found.items() if name not in ("swap", "power")}
    assert others == {"ok"} and len(found) == 11
    assert found["system"].found.endswith("L4T 36.4.4 (JetPack 6.2.1); targets: jetson-orin-nano-8gb")
    assert "nvpmodel -m 2 (MAXN_SUPER)" in (found["power"].todo or "")
    assert "fallocate" in (found["swap"].todo or "")


@pytest.mark.parametrize(
    ("seen", "packages", "check", "todo"),
    [
        ({"virtual_environment": False}, True, "TensorRT", "/usr/bin/python3 -m venv --system-site-packages"),
        ({"virtual_environment": None}, False, "TensorRT", "sudo apt install nvidia-jetpack"),
        ({"python": "3.11.2"}, True, "Python", "JetPack's TensorRT is for Python 3.10"),
        ({"python": "3.8.10"}, True, "Python", "Python 3.10 or newer"),
        ({"versions": WHEELS | {"tensorrt": "10.16.1"}}, True, "TensorRT", "takes >=10.3,<10.4"),
        ({"versions": WHEELS | {"cuda-bindings": "13.0.1"}}, True, "CUDA", "'cuda-python==12.*'"),
        ({"versions": {}}, True, "wheels", "pip install trimvlm"),
        ({"compute_capability": None}, True, "GPU", "groups video and render"),
    ],
)
def test_jetpack6_with_a_fault(
    jetpack6: Path, seen: dict[str, Any], packages: bool, check: str, todo: str
) -> None:
    if not packages:
        (jetpack6 / "var/lib/dpkg/status").unlink()
    found = checked(read(jetpack6, process(**seen)))[check]
    assert found.state == "bad"
    assert todo in (found.todo or "")


def test_board_whose_vocabulary_is_split_needs_onnx_to_build(jetpack6: Path) -> None:
    versions = {name: version for name, version in WHEELS.items() if name != "onnx"}
    found = checked(read(jetpack6, process(versions=versions)))["wheels"]
    assert (found.state, found.todo) == ("warn", "pip install onnx")
    larger = checked(read(jetpack6, process(versions=versions)), "jetson-agx-orin-64gb")["wheels"]
    assert larger.state == "ok"


def test_packages_that_were_removed_are_not_there(jetpack6: Path) -> None:
    status = jetpack6 / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("install ok installed", "deinstall ok config-files"))
    assert read(jetpack6, process()).tensorrt is None


def test_jetpack7_is_recognised_and_refused_for_another_board(jetpack7: Path) -> None:
    versions = WHEELS | {"tensorrt": "10.16.1.11", "cuda-bindings": "13.2.0"}
    seen = process(python="3.12.3", versions=versions, compute_capability="11.0")
    facts = read(jetpack7, seen)
    found = checked(facts)
    assert not [check for check in found.values() if check.state == "bad"]
    assert "targets: jetson-thor-t5000" in found["system"].found
    meant = checked(facts, "jetson-orin-nano-8gb")
    assert {name for name, check in meant.items() if check.state == "bad"} == {"system", "GPU", "TensorRT"}
    assert "cover JetPack 6.2 (L4T >=36.4.3,<37) and JetPack 7.2" in (meant["system"].todo or "")
    small = checked(msgspec.structs.replace(facts, memory=60 * 2**30), "jetson-thor-t5000")
    assert (small["memory"].state, small["memory"].todo) == (
        "bad",
        "target jetson-thor-t5000 is a board of 122.8 GiB; choose a smaller one",
    )


@pytest.mark.parametrize(
    ("kb", "model", "name"),
    [
        (7802880, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx-8gb"),
        (16031744, "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx-16gb"),
        (3500000, "NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano-4gb"),
        (64349184, "NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin-64gb"),
        (31200000, "A carrier of another maker", "jetson-agx-orin-32gb"),
    ],
)
def test_boards_are_told_apart(jetpack6: Path, kb: int, model: str, name: str) -> None:
    (jetpack6 / "proc/meminfo").write_text(f"MemTotal: {kb} kB\nMemAvailable: {kb} kB\n")
    (jetpack6 / "proc/device-tree/model").write_text(model + "\0")
    found = checked(read(jetpack6, process()))
    assert found["system"].found.endswith(f"targets: {name}")
    assert found["CMA"].state == "-"


def test_jetson_linux_that_no_target_covers(jetpack6: Path) -> None:
    release = jetpack6 / "etc/nv_tegra_release"
    release.write_text(release.read_text().replace("R36", "R35"))
    assert checked(read(jetpack6, process()))["system"].state == "bad"


def test_little_contiguous_memory_and_little_free(jetpack6: Path) -> None:
    info = jetpack6 / "proc/meminfo"
    info.write_text("MemTotal: 7802880 kB\nMemAvailable: 3000000 kB\nCmaTotal: 65536 kB\nCmaFree: 1000 kB\n")
    found = checked(read(jetpack6, process()))
    assert (found["CMA"].state, found["memory"].state) == ("warn", "warn")
    assert "cma=256M" in (found["CMA"].todo or "") and "multi-user.target" in (found["memory"].todo or "")


def test_desktop(desktop: Path) -> None:
    seen = process(
        machine="x86_64", versions=WHEELS | {"tensorrt-rtx": "1.7.1.116"}, compute_capability="8.9"
    )
    found = checked(read(desktop, seen))
    assert not {"CMA", "swap", "power"} & found.keys()
    assert "targets: rtx-4070, rtx-4070-tensorrt, rtx-4090" in found["system"].found
    assert found["GPU"].found == "SM 8.9, driver 580.95.05"
    assert found["ONNX Runtime"].state == "-"
    other = checked(read(desktop, seen), "rtx-5090")
    assert (other["GPU"].state, other["GPU"].todo) == (
        "warn",
        "target rtx-5090 is SM 12.0: plans can be built here, not run",
    )
    classic = checked(read(desktop, seen), "rtx-4090-tensorrt")
    assert classic["TensorRT"].state == "bad"


def test_providers_of_onnx_runtime(desktop: Path) -> None:
    ordinary = WHEELS | {"onnxruntime": "1.31.1"}
    rtx = ordinary | {"onnxruntime-ep-nv-tensorrt-rtx-cu13": "0.5.0"}
    for name, versions, state, said in (
        ("ort-cuda", ordinary, "bad", "trimvlm[ort-gpu]"),
        ("ort-cuda", WHEELS | {"onnxruntime-gpu": "1.31.1"}, "ok", "onnxruntime-gpu 1.31.1"),
        ("ort-trt-rtx", ordinary, "bad", "trimvlm[ort-rtx]"),
        ("ort-trt-rtx", rtx, "ok", "cu13 0.5.0"),
    ):
        seen = process(machine="x86_64", versions=versions, compute_capability=None)
        found = checked(read(desktop, seen), name)
        assert found["provider"].state == state
        assert said in f"{found['provider'].found} {found['provider'].todo}"
        assert found["GPU"].state == "bad" and "install NVIDIA's driver" in (found["GPU"].todo or "")
        assert found["ONNX Runtime"].state == "ok"
    assert "provider" not in checked(read(desktop, process(machine="x86_64", versions=ordinary)), "ort-cpu")


def test_nothing_that_runs_a_bundle_is_bad(desktop: Path) -> None:
    seen = process(machine="x86_64", versions=WHEELS, compute_capability=None)
    found = checked(read(desktop, seen))
    assert {name for name, check in found.items() if check.state == "bad"} == {"ONNX Runtime"}
    assert "trimvlm[ort]" in (found["ONNX Runtime"].todo or "")


def test_machine_without_any_of_the_files(tmp_path: Path) -> None:
    facts = read(tmp_path, process(compute_capability=None))
    assert (facts.l4t, facts.memory, facts.power_mode, facts.power_modes) == (None, None, None, {})
    assert checked(facts)["memory"].found == "unknown"


def test_every_fault_has_something_to_do(jetpack6: Path, desktop: Path) -> None:
    bare = {"versions": {}, "compute_capability": None, "python": "3.9.1", "virtual_environment": None}
    for facts in (read(root, process(**bare)) for root in (jetpack6, desktop)):
        faults = [check for check in checked(facts).values() if check.state in ("bad", "warn")]
        assert faults and all(check.todo for check in faults)


def test_tensorrt_without_metadata_is_read_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("a TensorRT is installed here")
    module = '__version__ = "10.3.0"\nraise AssertionError("imported")\n'
    monkeypatch.syspath_prepend(write(tmp_path, {"tensorrt/__init__.py": module}))
    assert this_process().versions["tensorrt"] == "10.3.0"


def test_here(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever this machine is, it runs trimvlm's tests."""
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert (states["Python"], states["wheels"]) == ("ok", "ok")
    assert code == (0 if report["ok"] else 1)
    assert report["ok"] is ("bad" not in states.values())
    assert report["facts"]["process"]["versions"]["numpy"]


def test_here_for_a_board_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--target", "jetson-thor-t5000"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["check", "state", "found"]
    assert "to do:" in out and out.splitlines()[-1].startswith("bad: ")
