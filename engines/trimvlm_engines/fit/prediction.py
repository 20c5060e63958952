"""`predict`: a bundle's profile, a target and a request in, memory and times out. Nothing is built or run."""

from __future__ import annotations

import msgspec

from trimvlm.bundle import Bundle, Dtype
from trimvlm.target import Target
from trimvlm.value import Value
from trimvlm_engines.fit import on_cpu, on_gpu, roofline
from trimvlm_engines.fit.memory import MIB, VALUE_BYTES, Memory, kv_layers
from trimvlm_engines.fit.roofline import Times
from trimvlm_engines.fit.sizes import Request
from trimvlm_engines.fit.subject import Subject

CPU = "CPUExecutionProvider"
# ONNX Runtime on an x86 CPU computes float16 in float32, weights included (measured: version 1.31).
WIDE = 4


class Prediction(Value, frozen=True, kw_only=True):
    """What a profile will need on a target, and whether that fits.

    Attributes:
        kv_layers: bytes of keys and values per layer at the end of the answer that was asked for.
        usable: bytes of memory that the target has; None: its file does not say.
        problems: why it does not fit.
        unknown: what could not be judged, and why.
        times: None where they were not asked for.
    """

    profile: str
    target: str
    dtype: Dtype
    request: Request
    memory: Memory
    kv_layers: tuple[int, ...]
    usable: int | None
    problems: tuple[str, ...]
    unknown: tuple[str, ...]
    times: Times | None = None

    @property
    def fits(self) -> bool | None:
        """None: the target's memory is unknown, and nothing else speaks against it."""
        if self.problems:
            return False
        return None if self.usable is None else True

    @property
    def takes_turns(self) -> bool:
        """It fits only where engines take turns in memory."""
        return self.fits is True and self.usable is not None and self.memory.peak > self.usable

    @property
    def left(self) -> int | None:
        """Bytes that stay free; negative: bytes that are missing."""
        return None if self.usable is None else self.usable - self.memory.least


def predict(
    bundle: Bundle,
    profile: str | None,
    target: Target,
    request: Request,
    *,
    dtype: Dtype | None = None,
    times: bool = True,
) -> Prediction:
    """Predicts one answer after another to a request.

    Args:
        dtype: as if the bundle were of this precision (`float16` for one of float32); None: its own.
        times: also estimate how long an answer takes.

    Raises:
        UserError: no such profile, no decoder for the target, or a selection that its TopK cannot make.
    """
    name, _ = bundle.entry(profile)
    dtype = dtype or bundle.manifest.dtype
    float_bytes = None if dtype == bundle.manifest.dtype else VALUE_BYTES[dtype]
    if target.provider == CPU:
        float_bytes = WIDE
    # What a run on the CPU and times are counted with: the decoder as it was exported.
    limits = msgspec.structs.replace(target.limits, layers_per_engine=None, lm_head_columns=None)
    whole = Subject.of(bundle, name, msgspec.structs.replace(target, limits=limits), float_bytes)
    if target.provider == CPU:
        memory = on_cpu.memory(bundle, whole, request, VALUE_BYTES[dtype])
    else:
        memory = on_gpu.memory(Subject.of(bundle, name, target, float_bytes), target, VALUE_BYTES[dtype])
    return Prediction(
        profile=name,
        target=target.name,
        dtype=dtype,
        request=request,
        memory=memory,
        kv_layers=kv_layers(whole.schedule, request, VALUE_BYTES[dtype]),
        usable=None if target.memory_gb is None else int(target.memory_gb * 2**30),
        problems=tuple(_problems(target, memory, request, dtype)),
        unknown=tuple(_unknown(target)),
        times=roofline.estimate(whole, request, target, dtype) if times else None,
    )


def _problems(target: Target, memory: Memory, request: Request, dtype: Dtype) -> list[str]:
    """Everything that keeps it from running."""
    found = []
    if dtype not in target.dtypes:
        found.append(f"{dtype}: the target runs {', '.join(target.dtypes)}")
    if target.memory_gb is not None and memory.least > target.memory_gb * 2**30:
        missing = memory.least - target.memory_gb * 2**30
        found.append(f"memory: {missing / MIB:,.0f} MiB too much for {target.memory_gb:g} GiB")
    limit = target.limits.allocation_mb
    for piece in memory.at_once:
        if limit is not None and piece.bytes > limit * MIB:
            found.append(
                f"{piece.name}: {piece.bytes / MIB:,.0f} MiB in one piece, where the target gives {limit} MiB"
            )
    if target.backend != "onnxruntime":
        for field, most in request.excess(target.limits).items():
            found.append(f"{field}: {getattr(request, field)} is more than its plans' limits.{field}, {most}")
    return found


def _unknown(target: Target) -> list[str]:
    found = []
    if target.memory_gb is None:
        found.append("memory_gb: whether it fits")
    if target.provider not in (CPU, None):
        found.append(f"{target.provider}: its memory was not measured; counted as for a plan")
    return found
