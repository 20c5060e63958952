"""What a figure was measured on: processor, cores, governor, memory, load, and the versions that ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from trimvlm.value import Value

_PACKAGES = ("trimvlm", "onnxruntime", "onnx", "numpy", "torch", "transformers")


class Machine(Value, frozen=True, kw_only=True):
    """Fingerprint of the machine and the software. What cannot be read is None.

    Attributes:
        cores: processors that this process may use.
        governor: frequency governor of the first processor.
        memory_bytes: installed memory.
        load: load averages over 1, 5 and 15 minutes before the measurement.
    """

    cpu: str | None
    cores: int
    governor: str | None
    memory_bytes: int | None
    load: tuple[float, float, float] | None
    system: str
    python: str
    versions: dict[str, str]


def fingerprint() -> Machine:
    """Reads this machine's."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=_field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        governor=_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        memory_bytes=kibibytes(_field(Path("/proc/meminfo"), "MemTotal")),
        load=os.getloadavg() if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions=versions,
    )


class Busy:
    """Processor time that the whole machine spent, to tell how much of it was not ours. Linux only."""

    def __init__(self) -> None:
        self.start = _processor_seconds()

    def others(self, own_seconds: float, wall_seconds: float) -> float | None:
        """Processors kept busy by others on average since the start (stolen time included)."""
        now = _processor_seconds()
        if self.start is None or now is None or wall_seconds <= 0:
            return None
        return max(0.0, now - self.start - own_seconds) / wall_seconds


def available_bytes() -> int | None:
    """Memory that new processes can have without swapping; None: unknown."""
    return kibibytes(_field(Path("/proc/meminfo"), "MemAvailable"))


def kibibytes(text: str | None) -> int | None:
    """`  1234 kB` of the kernel's files, in bytes."""
    return int(text.split()[0]) * 1024 if text else None


def _processor_seconds() -> float | None:
    line = _field(Path("/proc/stat"), "cpu", separator=" ")
    if line is None:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _field(path: Path, name: str, separator: str = ":") -> str | None:
    for line in (_text(path) or "").splitlines():
        key, _, value = line.partition(separator)
        if key.strip() == name:
            return value.strip()
    return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
