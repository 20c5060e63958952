"""Checks of memory and, on a Jetson, of CMA, swap and power mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trimvlm.target import Target
from trimvlm.value import Value
from trimvlm_tools.doctor.facts import Facts

State = Literal["ok", "warn", "bad", "-"]

GIB = 2**30
SMALL = 16 * GIB
# Times the weights, measured with TensorRT-RTX 1.7.1 on external data.
BUILD_FACTOR = 2.8


class Check(Value, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        state: `bad`: something will not work; `warn`: it may not; `-`: not there, and only some need it.
        found: what there is.
        todo: what to do, where there is something to do.
    """

    name: str
    state: State
    found: str
    todo: str | None = None


def memory(facts: Facts, wanted: Target | None) -> Check:
    """Memory of the machine; on a Jetson the GPU's too."""
    if facts.memory is None or facts.available is None:
        return Check(name="memory", state="-", found="unknown")
    found = f"{size(facts.memory)}, {size(facts.available)} available"
    if wanted and wanted.l4t and facts.l4t and facts.memory / GIB < 0.9 * (wanted.memory_gb or 0):
        todo = f"target {wanted.name} is a board of {wanted.memory_gb:g} GiB; choose a smaller one"
        return Check(name="memory", state="bad", found=found, todo=todo)
    if facts.l4t and facts.available < 0.7 * facts.memory:
        todo = "stop the desktop and other programs: sudo systemctl isolate multi-user.target"
        return Check(name="memory", state="warn", found=found, todo=todo)
    return Check(name="memory", state="ok", found=found)


def cma(facts: Facts, known: Sequence[Target]) -> Check:
    """Contiguous memory, which builds on small boards run out of first."""
    if facts.cma is None:
        return Check(name="CMA", state="-", found="unknown")
    found = f"{size(facts.cma)}, {size(facts.cma_free or 0)} free"
    need = next((target.limits.allocation_mb for target in known if target.limits.allocation_mb), None)
    if need and facts.cma < need * 2**20:
        todo = f"add cma={need}M to APPEND in /boot/extlinux/extlinux.conf and reboot (not tried here)"
        return Check(name="CMA", state="warn", found=found, todo=todo)
    return Check(name="CMA", state="ok", found=found)


def swap(facts: Facts) -> Check:
    """Swap on disk: a build needs more memory than the engine that it makes."""
    found = f"{size(facts.swap_disk)} on disk, {size(facts.swap_zram)} in zram"
    if facts.memory is not None and facts.memory < SMALL and facts.swap_disk < facts.memory:
        todo = (
            f"a build takes about {BUILD_FACTOR:g} times the weights: "
            "sudo systemctl disable --now nvzramconfig; sudo fallocate -l 16G /swapfile; "
            "sudo chmod 600 /swapfile; sudo mkswap /swapfile; sudo swapon /swapfile "
            "(on NVMe, not on an SD card)"
        )
        return Check(name="swap", state="warn", found=found, todo=todo)
    return Check(name="swap", state="ok", found=found)


def power(facts: Facts) -> Check:
    """Power mode: another than the largest halves what the datasheet promises."""
    best = next(
        (number for number, name in facts.power_modes.items() if name.startswith("MAXN")),
        None,
    )
    if facts.power_mode is None:
        return Check(name="power", state="-", found="unknown", todo="sudo nvpmodel -q says it")
    if best is not None and not facts.power_mode.startswith("MAXN"):
        todo = f"for full speed: sudo nvpmodel -m {best} ({facts.power_modes[best]}), then sudo jetson_clocks"
        return Check(name="power", state="warn", found=facts.power_mode, todo=todo)
    return Check(name="power", state="ok", found=facts.power_mode)


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 2**20:.0f} MiB"
