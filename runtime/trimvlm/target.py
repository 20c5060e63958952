"""A Target: a device to build for. Loaded from YAML by `trimvlm_engines.targets`; the type lives here because
a manifest and a device need it."""

from __future__ import annotations

from typing import Literal

from trimvlm.bundle import Dtype, Lowering
from trimvlm.errors import UserError
from trimvlm.profile import Value


class Target(Value, kw_only=True):
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
    tested: Literal["run", "built", "not yet run"]
    source: str

    def __post_init__(self) -> None:
        if self.backend != "onnxruntime" and self.compute_capability is None:
            raise UserError(f"target {self.name}: compute_capability: a {self.backend} target needs one")
