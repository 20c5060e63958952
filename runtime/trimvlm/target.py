"""A Target: a device to build for. Loaded from YAML by `trimvlm_engines.targets`; the type lives here because
a manifest and a device need it."""

from __future__ import annotations

import re
from typing import Literal, get_args

import msgspec

from trimvlm.bundle import DecoderGraph, Dtype, Lowering
from trimvlm.errors import UserError
from trimvlm.manifest import WEIGHT_KINDS
from trimvlm.schedule_checks import TENSORRT_TOPK_LIMIT
from trimvlm.value import Value

# ONNX Runtime's own names.
Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"]

# What NVIDIA's support matrix lists for TensorRT-RTX 1.7: neither Jetson (8.7, 11.0) nor Hopper (9.0).
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
# First TensorRT with RotaryEmbedding and RMSNormalization next to Attention (10.14).
FUSED_SINCE = (10, 15)

_CLAUSE = re.compile(r"(>=|<)(\d+(?:\.\d+)*)")


class Limits(Value, frozen=True, kw_only=True):
    """The largest request that a plan is built for, and what the library and the board bear.

    More room for requests costs activation memory on the device.

    Attributes:
        images: images in the context.
        text: text rows of one prefill.
        new_tokens: tokens generated after it.
        topk: largest k of the library's TopK.
        lm_head_columns: vocabulary entries of one MatMul of the language model head, and of one piece of the
            token embeddings; None: all in one.
        layers_per_engine: decoder layers of one engine; None: all in one.
        allocation_mb: largest contiguous piece of memory in MiB that the board is known to give; None: any.
    """

    images: int = 2
    text: int = 512
    new_tokens: int = 512
    topk: int = TENSORRT_TOPK_LIMIT
    lm_head_columns: int | None = None
    layers_per_engine: int | None = None
    allocation_mb: int | None = None

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise UserError(f"limits.{field}: {value} is not a positive count")
        if self.topk > TENSORRT_TOPK_LIMIT:
            raise UserError(
                f"limits.topk: TensorRT's TopK takes at most {TENSORRT_TOPK_LIMIT}, not {self.topk}"
            )


RESERVED = ("decoder", "vision", "projector", "router", "weights", *WEIGHT_KINDS)


class PlanOptions(Value, frozen=True, kw_only=True):
    """How plans are made beside what their graph says; part of what an engine is bound to.

    Attributes:
        version_compatible: the plan also runs on newer minor versions of the same major, somewhat slower, and
            holds code of the library (classic TensorRT).
        stripped: the plan holds no weights; they are put in from the bundle when it is opened.
    """

    version_compatible: bool = False
    stripped: bool = False

    def __post_init__(self) -> None:
        if self.version_compatible and self.stripped:
            raise UserError(
                "plan: version_compatible and stripped exclude each other: the runtime inside a "
                "version-compatible plan cannot put weights in; choose one"
            )


BLOCKS = (128, 64, 32, 16)


class Weights(Value, frozen=True, kw_only=True):
    """How weights of matrices are stored and read; see `trimvlm_engines.quantizing`.

    Attributes:
        bits: of each weight.
        block: consecutive weights of a row that share a scale; for TensorRT at most, see `block_of`.
        activations: what they are multiplied with: `float`, as the graph computes; `int8`: activations are
            rounded too, block by block, which is faster and less exact (ONNX Runtime's CPU provider).
    """

    bits: Literal[4, 8]
    block: Literal[16, 32, 64, 128] = 32
    activations: Literal["float", "int8"] = "float"

    @property
    def vision(self) -> Weights | None:
        """How those of the tower and the projector are; None: as in the checkpoint.

        In 8 bits, and only where activations are rounded too: hundreds of rows are multiplied with each
        matrix, which are faster by arithmetic in int8, not by fewer bytes.
        """
        return msgspec.structs.replace(self, bits=8) if self.activations == "int8" else None

    def block_of(self, width: int) -> int | None:
        """The largest block that `width` is a multiple of; None: not even of the smallest."""
        return next((each for each in BLOCKS if each <= self.block and width % each == 0), None)


class Tested(Value, frozen=True, kw_only=True):
    """What was done for a Target and with what; None: never done.

    Attributes:
        built: plans were built.
        run: a plan or graph was executed.
        measured: time or memory was measured while it ran.
    """

    built: str | None = None
    run: str | None = None
    measured: str | None = None

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if value is not None and not value.strip():
                raise UserError(f"tested.{field}: say what it was done with, or leave it out")
        if self.measured and not self.run:
            raise UserError("tested.measured: what never ran cannot have been measured; fill in tested.run")


class Target(Value, frozen=True, kw_only=True):
    """One device and the library that runs on it.

    Attributes:
        name: e.g. `jetson-orin-nano-8gb`.
        device: the module or card, for people.
        system: JetPack or operating system, for people.
        l4t: releases of Jetson Linux that are allowed, `>=36.4.3,<37` style; None where it is no Jetson.
        backend: `onnxruntime` (the graph itself runs), `tensorrt` or `tensorrt_rtx` (a plan is built).
        provider: of ONNX Runtime, what executes the graph; None for the others.
        versions: versions of the backend's library that are allowed, `>=10.3,<10.4` style.
        lowering: which decoder graph it takes.
        empty_tensors: the library executes empty tensors; False: it takes the decoder graph that has none
            (`trimvlm.filling`).
        dtypes: precisions it runs, best first.
        compute_capability: SM of the GPU, e.g. `8.9`; None where nothing is built for one.
        build_on_device: the plan must be built on this very device (classic TensorRT).
        ranges: `joint`: one range of shapes for prefill and decode; `split`: one each.
        weights: how weights are quantised; None: not at all.
        padded: rows of matrices that are whole pages are stored a cache line longer, for ONNX Runtime's
            products on a CPU; see `trimvlm_engines.padding`.
        plan: how plans are made.
        memory_gb: usable memory in GiB; on a Jetson what Linux shows, which the system needs a part of.
        bandwidth_gb_s: of that memory, from the datasheet.
        tflops: dense float16 peak of the tensor cores, sums in float32 where the datasheet tells them apart.
        limits: the largest request that a plan is built for, and what library and board bear.
        tested: what has been done on it.
        source: where the figures come from.
    """

    name: str
    device: str
    system: str
    l4t: str | None = None
    backend: Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
    provider: Provider | None = None
    versions: str
    lowering: Lowering
    empty_tensors: bool = True
    dtypes: tuple[Dtype, ...]
    compute_capability: str | None = None
    build_on_device: bool = False
    ranges: Literal["joint", "split"] = "joint"
    weights: Weights | None = None
    padded: bool = False
    plan: PlanOptions = PlanOptions()
    memory_gb: float | None = None
    bandwidth_gb_s: float | None = None
    tflops: float | None = None
    limits: Limits = Limits()
    tested: Tested = Tested()
    source: str

    def __post_init__(self) -> None:
        where = f"target {self.name}"
        if self.name in RESERVED:
            raise UserError(
                f"name: {self.name!r} is what other files in a bundle are named by; choose another"
            )
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise UserError(f"name: {self.name!r} cannot name files; use lower-case letters, digits and '-'")
        for field in ("versions", "l4t"):
            text = getattr(self, field)
            if text is not None and not all(_CLAUSE.fullmatch(clause) for clause in text.split(",")):
                raise UserError(f"{where}: {field}: {text!r} is not of the form >=10.3,<10.4")
        if not self.dtypes:
            raise UserError(f"{where}: dtypes: name at least one of float16, bfloat16, float32")
        for field, wanted in (
            ("system", "what it runs, e.g. JetPack 6.2"),
            ("source", "where the figures come from"),
        ):
            if not getattr(self, field).strip():
                raise UserError(f"{where}: {field}: say {wanted}")
        for field in ("memory_gb", "bandwidth_gb_s", "tflops"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UserError(f"{where}: {field}: {value:g} is not positive; leave it out if it is unknown")
        for field, said in self._misplaced().items():
            raise UserError(f"{where}: {field}: {said}")

    def _misplaced(self) -> dict[str, str]:
        """Fields that do not go with the backend, and why."""
        onnx, classic, rtx = (self.backend == name for name in ("onnxruntime", "tensorrt", "tensorrt_rtx"))
        capability, found = self.compute_capability, {}
        if (capability is None) != onnx:
            found["compute_capability"] = (
                f"a {self.backend} target {'needs one' if capability is None else 'has no use for one'}"
            )
        elif rtx and capability not in RTX_CAPABILITIES:
            found["compute_capability"] = (
                f"TensorRT-RTX runs on {', '.join(RTX_CAPABILITIES)}, not on {capability}; "
                "use backend tensorrt"
            )
        if (self.provider is None) == onnx:
            found["provider"] = (
                f"an onnxruntime target names one of {', '.join(get_args(Provider))}"
                if onnx
                else f"a {self.backend} target has no use for one"
            )
        if self.build_on_device != classic:
            found["build_on_device"] = f"a {self.backend} target " + (
                "must be built on the device" if classic else "is not built on the device"
            )
        if self.l4t and not classic:
            found["l4t"] = f"only classic TensorRT is built for Jetson, not {self.backend}"
        if onnx and self.ranges == "split":
            found["ranges"] = "ONNX Runtime takes any shape; leave it out"
        if onnx and self.plan != PlanOptions():
            found["plan"] = "ONNX Runtime has no plans; leave it out"
        cpu = self.provider == "CPUExecutionProvider"
        if self.padded and not cpu:
            found["padded"] = "only ONNX Runtime's CPU provider is faster by it; leave it out"
        elif self.padded and self.weights:
            found["padded"] = "quantised weights have rows of another length; leave it out"
        if not cpu and self.weights and self.weights.activations != "float":
            found["weights"] = (
                "activations: only ONNX Runtime's CPU provider rounds them to int8; leave it out"
            )
        if rtx and self.plan.version_compatible:
            found["plan"] = (
                "version_compatible: a TensorRT-RTX plan belongs to the very release that built it; leave it "
                "out, or use backend tensorrt"
            )
        if classic and self.lowering == "fused" and not self._always_fused():
            found["lowering"] = (
                f"fused needs TensorRT 10.15 or newer, but versions {self.versions} allows older ones; "
                "use primitive"
            )
        return found

    @property
    def decoder(self) -> DecoderGraph:
        """Which of a bundle's decoder graphs it takes."""
        if self.lowering == "fused":
            return "fused" if self.empty_tensors else "fused.filled"
        return "primitive" if self.empty_tensors else "primitive.filled"

    def allows(self, version: str) -> bool:
        """Whether `version` of the backend's library (e.g. `10.3.0.30`) is within `versions`."""
        return within(version, self.versions)

    def runs_on(self, l4t: str | None) -> bool:
        """Whether a machine with this release of Jetson Linux (None: no Jetson) is one the Target allows."""
        return (l4t is None) == (self.l4t is None) and (not l4t or within(l4t, self.l4t or ""))

    def _always_fused(self) -> bool:
        lowest = [numbers(limit) for sign, limit in _CLAUSE.findall(self.versions) if sign == ">="]
        return bool(lowest) and max(lowest) >= FUSED_SINCE


def within(version: str, clauses: str) -> bool:
    """Whether a version satisfies clauses of the form `>=10.3,<10.4`."""
    found = numbers(version)
    return all(
        found >= numbers(limit) if sign == ">=" else found < numbers(limit)
        for sign, limit in _CLAUSE.findall(clauses)
    )


def numbers(version: str) -> tuple[int, ...]:
    """`1.7.1.116` as numbers, which sort; whatever follows them (`rc1`, `+cpu`) is no part of the order."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
