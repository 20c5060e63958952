"""Facts about a machine: read from the files of one root directory, and asked of this process.

Nothing here runs a program or needs rights. What cannot be read is None, never a guess.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import sys
from pathlib import Path

import msgspec

from trimvlm.value import Value

# Distributions that are looked for.
DISTRIBUTIONS = (
    *("numpy", "msgspec", "tokenizers", "pillow"),
    *("pyyaml", "filelock", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "cuda-bindings"),
    *("onnx", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12"),
)
TENSORRT_WHEELS = ("tensorrt-cu13", "tensorrt-cu12")
# `compatible` strings of the device tree: the chip decides the SM.
CHIPS = {"nvidia,tegra234": "8.7", "nvidia,tegra264": "11.0"}


class Process(Value, frozen=True, kw_only=True):
    """What this Python sees.

    Attributes:
        machine: processor, e.g. `aarch64`.
        python: version, e.g. `3.10.12`.
        virtual_environment: None outside of one, else whether it sees the system's packages.
        versions: of the distributions found, by name.
        compute_capability: of the GPU that the driver names.
    """

    machine: str
    python: str
    virtual_environment: bool | None
    versions: dict[str, str]
    compute_capability: str | None


class Facts(Value, frozen=True, kw_only=True):
    """One machine. Sizes in bytes.

    Attributes:
        system: of `/etc/os-release`.
        board: model of the device tree.
        chip_capability: SM of the board's chip; None where it is no Jetson known here.
        l4t: release of Jetson Linux, e.g. `36.4.3`.
        jetpack: version of the meta-package, where it is installed.
        system_python: version of `/usr/bin/python3`, e.g. `3.10`.
        driver: version of NVIDIA's kernel driver.
        cuda: version of the toolkit in `/usr/local/cuda`.
        tensorrt: the system's TensorRT, and its Python bindings.
        memory, available, cma, cma_free: of `/proc/meminfo`.
        swap_disk, swap_zram: swap on disks, and compressed swap that lives in memory itself.
        power_mode: name of the mode that is set.
        power_modes: all of them, number to name.
    """

    process: Process
    system: str | None
    board: str | None
    chip_capability: str | None
    l4t: str | None
    jetpack: str | None
    system_python: str | None
    driver: str | None
    cuda: str | None
    tensorrt: str | None
    tensorrt_python: str | None
    memory: int | None
    available: int | None
    cma: int | None
    cma_free: int | None
    swap_disk: int
    swap_zram: int
    power_mode: str | None
    power_modes: dict[int, str]

    @property
    def compute_capability(self) -> str | None:
        """SM by the driver, or by the chip of the board."""
        return self.process.compute_capability or self.chip_capability


def this_process() -> Process:
    """Asks this Python and the driver."""
    from trimvlm.machine import compute_capability

    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "tensorrt" not in versions and (found := _tensorrt_of_another_name()):
        versions["tensorrt"] = found
    inside = None
    if sys.prefix != sys.base_prefix:
        settings = _text(Path(sys.prefix) / "pyvenv.cfg") or ""
        inside = bool(re.search(r"include-system-site-packages\s*=\s*true", settings, re.IGNORECASE))
    return Process(
        machine=platform.machine().lower(),
        python=platform.python_version(),
        virtual_environment=inside,
        versions=versions,
        compute_capability=compute_capability(),
    )


def read(root: Path = Path("/"), process: Process | None = None) -> Facts:
    """Reads a machine.

    Args:
        root: where its file system starts.
        process: what its Python sees; None: this process.
    """
    memory = _memory(root)
    compatible = (_text(root / "proc/device-tree/compatible") or "").split("\0")
    packages = _packages(root, ("nvidia-jetpack", "libnvinfer10", "libnvinfer11", "python3-libnvinfer"))
    current, modes = _power(root)
    disk, zram = _swap(root)
    tegra = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _text(root / "etc/os-release") or "", re.MULTILINE)
    return Facts(
        process=process or this_process(),
        system=name[1] if name else None,
        board=(_text(root / "proc/device-tree/model") or "").strip("\0 \n") or None,
        chip_capability=next((CHIPS[chip] for chip in compatible if chip in CHIPS), None),
        l4t=f"{tegra[1]}.{tegra[2]}" if tegra else None,
        jetpack=packages.get("nvidia-jetpack"),
        system_python=_system_python(root),
        driver=_text(root / "sys/module/nvidia/version"),
        cuda=_cuda(root),
        tensorrt=packages.get("libnvinfer10") or packages.get("libnvinfer11"),
        tensorrt_python=packages.get("python3-libnvinfer"),
        memory=memory.get("MemTotal"),
        available=memory.get("MemAvailable"),
        cma=memory.get("CmaTotal"),
        cma_free=memory.get("CmaFree"),
        swap_disk=disk,
        swap_zram=zram,
        power_mode=None if current is None else modes.get(current, f"mode {current}"),
        power_modes=modes,
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _tensorrt_of_another_name() -> str | None:
    """Wheels carry the CUDA major in their name; a system package may bring the module without metadata.

    The module is read, not imported: an import loads the libraries.
    """
    for name in TENSORRT_WHEELS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec("tensorrt")
    source = _text(Path(spec.origin)) if spec and spec.origin else None
    found = re.search(r'^__version__ = "([^"]+)"', source or "", re.MULTILINE)
    return found[1] if found else None


def _memory(root: Path) -> dict[str, int]:
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    return {
        name: int(size) * 1024 for name, size in re.findall(r"^(\w+):\s+(\d+) kB", "\n".join(lines), re.M)
    }


def _swap(root: Path) -> tuple[int, int]:
    """Bytes of swap on disks and in zram."""
    disk = zram = 0
    for line in (_text(root / "proc/swaps") or "").splitlines()[1:]:
        name, _kind, size, *_ = line.split()
        if "zram" in name:
            zram += int(size) * 1024
        else:
            disk += int(size) * 1024
    return disk, zram


def _cuda(root: Path) -> str | None:
    try:
        return str(msgspec.json.decode(_text(root / "usr/local/cuda/version.json") or "")["cuda"]["version"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return None


def _system_python(root: Path) -> str | None:
    link = root / "usr/bin/python3"
    found = re.search(r"python(3\.\d+)$", str(link.readlink())) if link.is_symlink() else None
    return found[1] if found else None


def _packages(root: Path, wanted: tuple[str, ...]) -> dict[str, str]:
    """Versions of installed Debian packages, without their revision."""
    found = {}
    for entry in (_text(root / "var/lib/dpkg/status") or "").split("\n\n"):
        name, status, version = (
            re.search(rf"^{field}: (.+)$", entry, re.MULTILINE) for field in ("Package", "Status", "Version")
        )
        if name and name[1] in wanted and status and status[1].endswith(" installed") and version:
            found[name[1]] = re.split(r"[-+]", version[1])[0]
    return found


def _power(root: Path) -> tuple[int | None, dict[int, str]]:
    """Number of the power mode that is set, and the names of all modes."""
    settings = _text(root / "etc/nvpmodel.conf") or ""
    modes = {
        int(number): name
        for number, name in re.findall(r"^<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", settings, re.M)
    }
    current = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status") or "")
    return (int(current[1]) if current else None), modes
