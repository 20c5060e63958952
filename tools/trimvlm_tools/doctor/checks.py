"""What the facts mean for trimvlm, and what to do: one Check each, in the order in which to mend them.

Software is here, what only boards have is in `board`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trimvlm.backends.providers import CUDA, RTX
from trimvlm.target import Target
from trimvlm_tools.doctor.board import GIB, Check, State, cma, memory, power, swap
from trimvlm_tools.doctor.facts import Facts

BASE = ("numpy", "msgspec", "tokenizers", "pillow")
BUILD = ("pyyaml", "filelock")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt")
# What brings a provider of ONNX Runtime that needs a GPU: an extra, and its distributions (one of them).
PROVIDERS = {
    CUDA: ("ort-gpu", ("onnxruntime-gpu",)),
    RTX: ("ort-rtx", ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime-ep-nv-tensorrt-rtx-cu12")),
}
FAMILIES = ("Orin Nano", "Orin NX", "AGX Orin", "Thor")


def diagnose(facts: Facts, targets: Sequence[Target], wanted: Target | None = None) -> list[Check]:
    """All checks.

    Args:
        facts: of the machine.
        targets: those shipped; a board is recognised by them.
        wanted: what the machine is meant for; None: what it is recognised as.
    """
    known = [wanted] if wanted else recognised(facts, targets)
    checks = [python(facts), system(facts, known, targets), gpu(facts, wanted), cuda(facts)]
    checks += [
        tensorrt(facts, known, wanted),
        *libraries(facts, wanted),
        *provider(facts, wanted),
        wheels(facts, known),
        memory(facts, wanted),
    ]
    if facts.l4t:
        checks += [cma(facts, known), swap(facts), power(facts)]
    return checks


def recognised(facts: Facts, targets: Sequence[Target]) -> list[Target]:
    """Shipped targets that this machine can be: on a Jetson by chip, release, family and memory."""
    found = [
        target
        for target in targets
        if target.compute_capability
        and target.compute_capability == facts.compute_capability
        and target.runs_on(facts.l4t)
    ]
    family = next((name for name in FAMILIES if name in (facts.board or "")), None)
    if facts.l4t and family:
        found = [target for target in found if family in target.device]
    if facts.l4t and facts.memory:
        size = facts.memory / GIB
        found = sorted(found, key=lambda target: abs((target.memory_gb or 0) - size))[:1]
    return found


def python(facts: Facts) -> Check:
    """Python itself, and the virtual environment that hides a system's TensorRT."""
    process = facts.process
    inside = {
        None: "no virtual environment",
        True: "sees system packages",
        False: "does not see system packages",
    }
    found = f"{process.python}, {inside[process.virtual_environment]}"
    short = ".".join(process.python.split(".")[:2])
    if tuple(int(part) for part in short.split(".")) < (3, 10):
        return Check(name="Python", state="bad", found=found, todo="trimvlm needs Python 3.10 or newer")
    if facts.l4t and facts.system_python and short != facts.system_python:
        todo = (
            f"JetPack's TensorRT is for Python {facts.system_python}: "
            "/usr/bin/python3 -m venv --system-site-packages venv"
        )
        return Check(name="Python", state="bad", found=found, todo=todo)
    return Check(name="Python", state="ok", found=found)


def system(facts: Facts, known: Sequence[Target], targets: Sequence[Target]) -> Check:
    """JetPack or operating system, and the targets that go with it."""
    names = ", ".join(target.name for target in known) or "none but the ort- ones"
    if facts.l4t is None:
        found = f"{facts.system or 'system unknown'}, {facts.process.machine}; targets: {names}"
        if all(target.runs_on(None) for target in known):
            return Check(name="system", state="ok", found=found)
        todo = f"target {names} runs {known[0].system}: use such a board, or another target"
        return Check(name="system", state="bad", found=found, todo=todo)
    pack = f"JetPack {facts.jetpack}" if facts.jetpack else "nvidia-jetpack is not installed"
    found = f"{facts.board or 'Jetson'}, L4T {facts.l4t} ({pack}); targets: {names}"
    if any(target.runs_on(facts.l4t) for target in known):
        return Check(name="system", state="ok", found=found)
    covered = sorted(
        {f"{target.system.partition(' (')[0]} (L4T {target.l4t})" for target in targets if target.l4t}
    )
    todo = f"targets cover {' and '.join(covered)}; update, or write one of your own (docs/targets.md)"
    return Check(name="system", state="bad", found=found, todo=todo)


def gpu(facts: Facts, wanted: Target | None) -> Check:
    """The GPU's SM and its driver."""
    capability, driver = facts.compute_capability, facts.driver
    found = f"SM {capability}" if capability else "no GPU that CUDA can use"
    if driver:
        found += f", driver {driver}"
    if wanted and wanted.compute_capability and capability != wanted.compute_capability:
        mine = f"target {wanted.name} is SM {wanted.compute_capability}"
        if wanted.build_on_device:
            return Check(name="GPU", state="bad", found=found, todo=f"{mine}: build and run on that device")
        return Check(name="GPU", state="warn", found=found, todo=f"{mine}: plans can be built here, not run")
    if facts.l4t and facts.process.compute_capability is None:
        todo = "the driver does not answer: reboot, or join the groups video and render (sudo usermod -aG)"
        return Check(name="GPU", state="bad", found=found, todo=todo)
    if capability is None and wanted and wanted.provider in PROVIDERS:
        todo = f"target {wanted.name} runs on a GPU: install NVIDIA's driver"
        return Check(name="GPU", state="bad", found=found, todo=todo)
    if capability is None:
        todo = "nothing to do for ort-cpu; for a card install NVIDIA's driver"
        return Check(name="GPU", state="-", found=found, todo=todo)
    return Check(name="GPU", state="ok", found=found)


def cuda(facts: Facts) -> Check:
    """The toolkit, and the Python bindings that engines are run through."""
    bindings = facts.process.versions.get("cuda-bindings")
    found = f"toolkit {facts.cuda or 'none'}, cuda-bindings {bindings or 'none'}"
    if facts.compute_capability is None:
        return Check(name="CUDA", state="-", found=found)
    major = (facts.cuda or "").partition(".")[0]
    if bindings is None:
        pin = f"cuda-python=={major}.*" if major else "cuda-python"
        return Check(name="CUDA", state="warn", found=found, todo=f"to run plans: pip install '{pin}'")
    if major and bindings.partition(".")[0] != major:
        return Check(name="CUDA", state="bad", found=found, todo=f"pip install 'cuda-python=={major}.*'")
    if facts.l4t and facts.cuda is None:
        return Check(name="CUDA", state="warn", found=found, todo="sudo apt install nvidia-jetpack")
    return Check(name="CUDA", state="ok", found=found)


def tensorrt(facts: Facts, known: Sequence[Target], wanted: Target | None) -> Check:
    """Classic TensorRT: the system's, and whether this Python sees it."""
    seen, there = facts.process.versions.get("tensorrt"), facts.tensorrt
    found = f"this Python sees {seen or 'none'}, the system has {there or 'none'}"
    users = [target for target in known if target.backend == "tensorrt"]
    if seen:
        if not users or any(target.allows(seen) for target in users):
            return Check(name="TensorRT", state="ok", found=found)
        todo = f"target {users[0].name} takes {users[0].versions}: "
        todo += "sudo apt install tensorrt" if facts.l4t else "install that version from NVIDIA's index"
        return Check(name="TensorRT", state="bad", found=found, todo=todo)
    if facts.l4t is None:
        state: State = "bad" if wanted and wanted.backend == "tensorrt" else "-"
        return Check(name="TensorRT", state=state, found=found, todo="for -tensorrt targets: docs/desktop.md")
    if there is None:
        return Check(name="TensorRT", state="bad", found=found, todo="sudo apt install nvidia-jetpack")
    if facts.tensorrt_python is None:
        todo = "sudo apt install python3-libnvinfer"
    elif facts.process.virtual_environment is False:
        todo = "make the virtual environment again: /usr/bin/python3 -m venv --system-site-packages venv"
    else:
        todo = "use /usr/bin/python3: JetPack's bindings are for the system's Python alone"
    return Check(name="TensorRT", state="bad", found=found, todo=todo)


def libraries(facts: Facts, wanted: Target | None) -> list[Check]:
    """ONNX Runtime and TensorRT-RTX; at least one library must be there."""
    versions = facts.process.versions
    nothing = not any(name in versions for name in RUNTIMES)
    ort = versions.get("onnxruntime") or versions.get("onnxruntime-gpu")
    checks = []
    for name, backend, extra, version in (
        ("ONNX Runtime", "onnxruntime", "ort", ort),
        ("TensorRT-RTX", "tensorrt_rtx", "rtx", versions.get("tensorrt-rtx")),
    ):
        needed = wanted is not None and wanted.backend == backend
        todo = f"pip install 'trimvlm[{extra}]'"
        if version is None:
            if backend == "tensorrt_rtx" and facts.process.machine == "aarch64" and not needed:
                continue  # there is none for Arm
            state: State = "bad" if needed or (nothing and backend == "onnxruntime") else "-"
            checks.append(Check(name=name, state=state, found="not installed", todo=todo))
        elif needed and wanted and not wanted.allows(version):
            todo += f": target {wanted.name} takes {wanted.versions}"
            checks.append(Check(name=name, state="bad", found=version, todo=todo))
        else:
            checks.append(Check(name=name, state="ok", found=version))
    return checks


def provider(facts: Facts, wanted: Target | None) -> list[Check]:
    """ONNX Runtime's provider of a target that needs more than the CPU's."""
    if wanted is None or wanted.provider not in PROVIDERS:
        return []
    extra, names = PROVIDERS[wanted.provider]
    found = [f"{name} {facts.process.versions[name]}" for name in names if name in facts.process.versions]
    if found:
        return [Check(name="provider", state="ok", found=", ".join(found))]
    todo = f"pip install 'trimvlm[{extra}]' in an environment of its own"
    return [Check(name="provider", state="bad", found=f"no {wanted.provider}", todo=todo)]


def wheels(facts: Facts, known: Sequence[Target]) -> Check:
    """What trimvlm itself needs to run, and to build for these targets."""
    split = any(each.limits.lm_head_columns or each.limits.layers_per_engine for each in known)
    base = [name for name in BASE if name not in facts.process.versions]
    build = [name for name in (*BUILD, *["onnx"] * split) if name not in facts.process.versions]
    if base:
        return Check(
            name="wheels", state="bad", found=f"missing: {', '.join(base)}", todo="pip install trimvlm"
        )
    if build:
        found = f"missing for trimvlm build: {', '.join(build)}"
        return Check(name="wheels", state="warn", found=found, todo=f"pip install {' '.join(build)}")
    return Check(name="wheels", state="ok", found="all there")
