"""A Target: a device to build for. Loaded from YAML by `trimvlm_engines.targets`; the type lives here because
a manifest and a device need it."""

from __future__ import annotations

import re
from typing import Literal

from trimvlm.bundle import Dtype, Lowering
from trimvlm.errors import UserError
from trimvlm.value import Value

# What NVIDIA's support matrix lists for TensorRT-RTX 1.7: neither Jetson (8.7, 11.0) nor Hopper (9.0).
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# First TensorRT with RotaryEmbedding and RMSNormalization next to Attention (10.14).
FUSED_SINCE = (10, 15)

_CLAUSE = re.compile(r"(>=|<)(\d+(?:\.\d+)*)")


class Limits(Value, frozen=True, kw_only=True):
    """The largest request that a plan is built for; more room costs activation memory on the device.

    Attributes:
        images: images in the context.
        text: text rows of one prefill.
        new_tokens: tokens generated after it.
    """

    images: int = 2
    text: int = 512
    new_tokens: int = 512

    def __post_init__(self) -> None:
        for field in ("images", "text", "new_tokens"):
            if getattr(self, field) < 1:
                raise UserError(f"limits.{field}: {getattr(self, field)} is not a positive count")


class Target(Value, frozen=True, kw_only=True):
    """One device and the library that runs on it.

    Attributes:
        name: e.g. `jetson-orin-nano-8gb`.
        device: for people.
        backend: `onnxruntime` (the graph itself runs), `tensorrt` or `tensorrt_rtx` (a plan is built).
        versions: versions of the backend's library that are allowed, `>=10.3,<10.4` style.
        lowering: which decoder graph it takes.
        dtypes: precisions it runs, best first.
        compute_capability: SM of the GPU, e.g. `8.9`; None for a CPU.
        build_on_device: the plan must be built on this very device (classic TensorRT).
        memory_gb, bandwidth_gb_s: usable memory and its bandwidth, from the datasheet.
        limits: the largest request that a plan is built for; ONNX Runtime has no use for them.
        tested: what has been run: `run` (built and executed), `built`, `not yet run`.
        source: where the figures come from.
    """

    name: str
    device: str
    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    versions: str
    lowering: Lowering
    dtypes: tuple[Dtype, ...]
    compute_capability: str | None = None
    build_on_device: bool = False
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    limits: Limits = Limits()
    tested: Literal["run", "built", "not yet run"]
    source: str

    def __post_init__(self) -> None:
        where = f"target {self.name}"
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise UserError(f"name: {self.name!r} cannot name files; use lower-case letters, digits and '-'")
        if not all(_CLAUSE.fullmatch(clause) for clause in self.versions.split(",")):
            raise UserError(f"{where}: versions: {self.versions!r} is not of the form >=10.3,<10.4")
        if not self.dtypes:
            raise UserError(f"{where}: dtypes: name at least one of float16, bfloat16, float32")
        if not self.source.strip():
            raise UserError(f"{where}: source: say where the figures come from")
        if (self.compute_capability is None) != (self.backend == "onnxruntime"):
            said = "needs one" if self.compute_capability is None else "has no use for one"
            raise UserError(f"{where}: compute_capability: a {self.backend} target {said}")
        if self.build_on_device != (self.backend == "tensorrt"):
            said = (
                "must be built on the device" if self.backend == "tensorrt" else "is not built on the device"
            )
            raise UserError(f"{where}: build_on_device: a {self.backend} target {said}")
        if self.backend == "tensorrt_rtx" and self.compute_capability not in RTX_CAPABILITIES:
            raise UserError(
                f"{where}: compute_capability: TensorRT-RTX runs on {', '.join(RTX_CAPABILITIES)}, not on "
                f"{self.compute_capability}; use backend tensorrt"
            )
        if self.backend == "tensorrt" and self.lowering == "fused" and not self._always_fused():
            raise UserError(
                f"{where}: lowering: fused needs TensorRT 10.15 or newer, but versions {self.versions} "
                "allows older ones; use primitive"
            )

    def allows(self, version: str) -> bool:
        """Whether `version` of the backend's library (e.g. `10.3.0.30`) is within `versions`."""
        found = _numbers(version)
        return all(
            found >= _numbers(limit) if sign == ">=" else found < _numbers(limit)
            for sign, limit in _CLAUSE.findall(self.versions)
        )

    def _always_fused(self) -> bool:
        lowest = [_numbers(limit) for sign, limit in _CLAUSE.findall(self.versions) if sign == ">="]
        return bool(lowest) and max(lowest) >= FUSED_SINCE


def _numbers(version: str) -> tuple[int, ...]:
    """`1.7.1.116` as numbers; whatever follows them (`rc1`, `+cpu`) is no part of the order."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
