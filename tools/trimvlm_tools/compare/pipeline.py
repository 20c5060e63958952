"""Every method at matched FLOPs on the same held-out questions: `compare` shows the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trimvlm.accounting import kv_bytes_per_layer
from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.profile import Calibration, Profile
from trimvlm.profile import Method as MethodRecord
from trimvlm.schedule import Schedule
from trimvlm.value import Value
from trimvlm_calib.calibrated import Calibrated, save_calibrated
from trimvlm_calib.probe import Probe
from trimvlm_calib.samples import Sample
from trimvlm_export.export import export
from trimvlm_tools.compare.matching import Matched, as_published, is_adjustable, match, measured_curves
from trimvlm_tools.compare.statistics import difference, interval
from trimvlm_tools.demo.measure import Measured, measure

DENSE = "dense"


class Point(Value, frozen=True, kw_only=True):
    """One method at one target.

    Attributes:
        target: share of the dense model's FLOPs that was asked for; None: dense, and methods as published:
            those whose calibration decides the cost, and those that reach no target.
        flops_ratio: what was reached, scoring included.
        kv_bytes: keys and values after the prefill, float32.
        accuracy, interval: exact match and its 95 % bootstrap interval.
        against_dense: 95 % interval of the difference to dense on the same questions (paired).
        by_kind: exact match and its interval for each kind of question.
        first_token: median seconds from image and prompt to the first token.
    """

    method: str
    target: float | None
    parameters: dict[str, dict[str, Any]]
    flops_ratio: float
    mean_visual_tokens: float
    kv_bytes: int
    accuracy: float
    interval: tuple[float, float]
    against_dense: tuple[float, float]
    by_kind: dict[str, tuple[float, tuple[float, float]]]
    first_token: float


class Comparison(Value, frozen=True, kw_only=True):
    """What `trimvlm compare` measured.

    Attributes:
        out_of_reach: method and target to the reason.
    """

    questions: int
    calibration_samples: int
    text: int
    targets: tuple[float, ...]
    points: tuple[Point, ...]
    out_of_reach: dict[str, str]
    machine: dict[str, Any]


def compare(
    checkpoint: Path,
    probe: Probe,
    questions: Sequence[Sample],
    kinds: Sequence[str],
    out: Path,
    *,
    methods: Sequence[str],
    targets: Sequence[float],
    overrides: Mapping[str, Mapping[str, Any]],
    text: int,
    machine: dict[str, Any],
    step: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Calibrates, exports and asks.

    Args:
        probe: the model with the calibration samples.
        kinds: of each question.
        out: where the profiles and the bundle of all of them are written.
        methods: names, or compositions as `fastv+v-skip`.
        overrides: by method, parameters that are not the published ones.
        text: text rows of a typical prompt, for the FLOPs.
        step: called with a line after every point.

    Raises:
        UserError: an unknown method, or a sample that cannot be read.
    """
    profiles_dir, bundle_dir = out / "profiles", out / "bundle"
    profiles_dir.mkdir(parents=True, exist_ok=True)
    points: list[Point] = []
    unreachable: dict[str, str] = {}
    plan: list[tuple[str, float | None]] = [(DENSE, None)]
    for method in methods:
        plan += [(method, target) for target in (targets if is_adjustable(method) else [None])]
    dense: tuple[bool, ...] = ()
    for method, target in plan:
        label = method if target is None else f"{method}-{round(100 * target)}"
        try:
            if target is None:
                matched = as_published(method, probe, text, overrides)
            else:
                matched = match(method, probe, target, text, overrides)
        except UserError as error:
            unreachable[label] = str(error)
            step(f"{label}: out of reach")
            if target == targets[-1] and not any(point.method == method for point in points):
                plan.append((method, None))
            continue
        made = Calibrated(profiles=(_profile(label, method, matched, probe),), router=matched.outcome.router)
        save_calibrated(made, profiles_dir / f"{label}.yaml")
        profile = made.profiles[0]
        export(checkpoint, profile, bundle_dir, beside=profiles_dir)
        measured = measure(Bundle(bundle_dir), label, questions)
        dense = dense or measured.right
        points.append(
            _point(profile, target, matched=matched, measured=measured, dense=dense, kinds=kinds, text=text)
        )
        step(f"{label}: {measured.exact_match:.1%} exact match")
    return Comparison(
        questions=len(questions),
        calibration_samples=len(probe.inputs),
        text=text,
        targets=tuple(targets),
        points=tuple(points),
        out_of_reach=unreachable,
        machine=machine,
    )


def _profile(label: str, method: str, matched: Matched, probe: Probe) -> Profile:
    router = matched.outcome.router
    curves = measured_curves(matched.outcome)
    return Profile(
        name=label,
        method=MethodRecord(name=method, parameters=matched.parameters),
        model=probe.spec,
        decisions=matched.outcome.decisions,
        calibration=Calibration(data="compare", samples=len(probe.inputs), seed=0, curves=curves),
        needs_adapted_weights=matched.outcome.needs_adapted_weights,
        router=router.named(f"{label}.router.safetensors") if router else None,
    )


def _point(
    profile: Profile,
    target: float | None,
    *,
    matched: Matched,
    measured: Measured,
    dense: Sequence[bool],
    kinds: Sequence[str],
    text: int,
) -> Point:
    schedule = Schedule.resolve(profile, profile.model)
    by_kind = {}
    for kind in sorted(set(kinds)):
        answers = [right for right, of in zip(measured.right, kinds, strict=True) if of == kind]
        by_kind[kind] = (sum(answers) / len(answers), interval(answers))
    return Point(
        method=profile.method.name,
        target=target,
        parameters=matched.parameters,
        flops_ratio=matched.flops_ratio,
        mean_visual_tokens=schedule.mean_visual_tokens,
        kv_bytes=sum(kv_bytes_per_layer(schedule, text, 4)),
        accuracy=measured.exact_match,
        interval=interval(measured.right),
        against_dense=difference(measured.right, dense),
        by_kind=by_kind,
        first_token=measured.first_token,
    )
