"""The demo: calibrate, export, build, check and measure every method on the demo model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimvlm.accounting import kv_bytes_per_layer, mac2
from trimvlm.bundle import MANIFEST, Bundle
from trimvlm.errors import UserError
from trimvlm.opening import ORT_CPU
from trimvlm.parity import ParityReport
from trimvlm.profile import Decisions, Profile
from trimvlm.schedule import Schedule, resolve
from trimvlm.value import Value
from trimvlm_calib import files
from trimvlm_calib.calibrate import calibrate, method_record
from trimvlm_calib.samples import Sample, draw, load_samples
from trimvlm_engines.build import build
from trimvlm_export.checkpoint import model_spec
from trimvlm_export.export import export
from trimvlm_tools.demo.measure import Measured, measure, survivors
from trimvlm_tools.demo_data import write_samples
from trimvlm_tools.demo_model import CHECKPOINT
from trimvlm_tools.parity.check import HuggingFace, check
from trimvlm_tools.parity.quantized import quantized

# Methods with the parameters in which the demo model needs others than published: it has 12 layers, and the
# first three do not know yet what the question asks for.
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "v-skip": {},
    "fastv": {"layer": 3},
    "vtw": {"eta": 0.02},
    "shortv": {},
    "hidivdrop": {"eta": 0.02},
    "fastv+v-skip": {"fastv.layer": 3},
}
CALIBRATION, PARITY = 20, 20  # questions: two of each kind to calibrate on, two of each to check parity


class MethodResult(Value, frozen=True, kw_only=True):
    """One line of the demo's table.

    Attributes:
        flops_ratio: MAC2 of the prefill to the dense model's, for `text` text rows.
        kv_bytes: keys and values after the prefill, float32.
        stages: what is left of the example image: (where, surviving visual rows).
    """

    profile: Profile
    mean_visual_tokens: float
    flops_ratio: float
    kv_bytes: int
    measured: Measured
    parity: ParityReport
    stages: tuple[tuple[str, tuple[int, ...]], ...]


class DemoResult(Value, frozen=True, kw_only=True):
    """Everything that the demo's table and report show."""

    methods: tuple[MethodResult, ...]
    questions: int
    text: int
    example: str
    question: str
    machine: dict[str, Any]


def demo(
    out: Path, *, questions: int, target: str = ORT_CPU, step: Callable[[str], None] = lambda line: None
) -> DemoResult:
    """Runs every method through the pipeline. What an earlier run made of the same inputs is kept.

    Args:
        out: directory for profiles, bundle and samples.
        questions: held-out questions that accuracy and times are measured on.
        target: that runs the graphs, one of ONNX Runtime's.
        step: called with a line about what was just done.

    Raises:
        UserError: the demo model is not there.
    """
    if not (CHECKPOINT / "config.json").is_file():
        raise UserError(f"{CHECKPOINT}: the demo model is missing; check out the repository again")
    spec = model_spec(CHECKPOINT)
    calibration = load_samples(write_samples(out / "calibration", "calib", CALIBRATION))
    held_out = load_samples(write_samples(out / "held-out", "test", questions))
    bundle_dir = out / "bundle"
    hf, results = None, []
    for method in METHODS:
        profile = _profile(out, method, calibration, spec)
        step(f"{method}: profile")
        if not _exported(bundle_dir, profile):
            export(CHECKPOINT, profile, bundle_dir)
        build(bundle_dir, target, profile.name)
        step(f"{method}: graphs")
        bundle = Bundle(bundle_dir)
        hf = hf or HuggingFace(bundle, None, quantized(bundle.entry(profile.name)[1], target))
        some = draw(held_out, PARITY, seed=0)
        parity = check(bundle, profile.name, some, data="demo", hf=hf, target=target)
        step(f"{method}: parity {parity.verdict}")
        measured = measure(bundle, profile.name, held_out, target)
        step(f"{method}: {measured.exact_match:.1%} exact match")
        schedule = Schedule.resolve(profile, spec)
        text = measured.text_rows
        results.append(
            MethodResult(
                profile=profile,
                mean_visual_tokens=schedule.mean_visual_tokens,
                flops_ratio=mac2(schedule, text) / mac2(resolve(Decisions(), spec), text),
                kv_bytes=sum(kv_bytes_per_layer(schedule, text, 4)),
                measured=measured,
                parity=parity,
                stages=survivors(bundle, profile.name, schedule, held_out[0]),
            )
        )
    return DemoResult(
        methods=tuple(results),
        questions=questions,
        text=results[0].measured.text_rows,
        example=str(held_out[0].image),
        question=held_out[0].question,
        machine=machine(),
    )


def _profile(out: Path, method: str, calibration: Sequence[Sample], spec: Any) -> Profile:
    """The calibrated profile: from an earlier run for the same model, or made now."""
    path = out / "profiles" / f"{method}.yaml"
    if path.is_file():
        known = files.load_profile(path)
        if known.model == spec and known.method == method_record(method, METHODS[method]):
            return known
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = calibrate(CHECKPOINT, method, calibration, METHODS[method], data_name="demo", count=CALIBRATION)
    files.save_profile(profile, path)
    return profile


def _exported(directory: Path, profile: Profile) -> bool:
    """Whether the bundle holds graphs of exactly this profile."""
    if not (directory / MANIFEST).is_file():
        return False
    try:
        bundle = Bundle(directory)
    except UserError as error:
        raise UserError(f"{error}; here, remove {directory} and run the demo again") from None
    return profile.name in bundle.manifest.profiles and bundle.profile(profile.name).digest == profile.digest


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os
    import platform
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("onnxruntime", "torch", "transformers", "numpy")},
    }
