"""`trimvlm calibrate` as a function: from a checkpoint, a method and samples to a Profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import msgspec

from trimvlm.errors import UserError
from trimvlm.profile import Calibration, Grid, Profile, check_name
from trimvlm.profile import Method as MethodRecord
from trimvlm.schedule import resolve
from trimvlm_calib.calibrated import Calibrated
from trimvlm_calib.distributed import ALONE, Team
from trimvlm_calib.methods import Method, find
from trimvlm_calib.outcome import Outcome, merge
from trimvlm_calib.partial import Partial
from trimvlm_calib.samples import PreparedSamples, Sample, digest, draw, of_task

if TYPE_CHECKING:
    from trimvlm.profile import ModelSpec
    from trimvlm_calib.probe import Probe, Progress

P = ParamSpec("P")


def calibrate_all(
    checkpoint: Path | str,
    method: str,
    samples: Sequence[Sample],
    parameters: Mapping[str, Any] | None = None,
    *,
    data_name: str,
    count: int | None = None,
    seed: int = 0,
    task: str | None = None,
    name: str | None = None,
    grid: Grid | None = None,
    progress: Progress | None = None,
    output: Path | None = None,
    team: Team = ALONE,
) -> Calibrated:
    """Calibrates a method on a model; `save_calibrated` writes what it returns.

    Args:
        checkpoint: directory of a Hugging Face LLaVA.
        method: a name, or several as in `fastv+v-skip`: each is calibrated on the dense model, and their
            decisions are united.
        samples: what to draw from.
        parameters: by name (`keep`), or where there are several methods with the method's (`fastv.keep`).
        data_name: recorded in the Profile.
        count: how many samples to draw; None: as many as the paper took, or all where there are fewer.
        seed: decides which, and in what order.
        task: draw from the samples of this task only.
        name: the Profile's; None: the method's.
        grid: that every image is made to fit, for models whose images have one.
        progress: called as `progress(what, done, total)`.
        output: where the Profile will be written: measurements are kept beside it until
            `trimvlm_calib.partial.discard(output)`, and those of a run that was killed are taken up. None:
            nothing is kept.
        team: processes that share the samples; all of them return the same Profile.

    Raises:
        UserError: an unknown method or parameter, no model there, too few samples, an unreadable image, a
            partial file of another run, curves that decide nothing, or decisions that cannot be united.
    """
    from trimvlm_export.checkpoint import model_spec

    check_name(name or method)
    methods = find(method)
    settings = read_parameters(methods, parameters or {})
    spec = model_spec(checkpoint, grid)
    if task is not None:
        samples, data_name = of_task(samples, task), f"{data_name}, task {task}"
    wanted = max(each.SAMPLES for each in methods.values())
    drawn = draw(samples, min(wanted, len(samples)) if count is None else count, seed) if wanted else []
    partial = Partial(output if drawn else None, _bound(spec, method, drawn, seed), team.rank)
    probe = open_probe(checkpoint, spec, drawn, progress=progress, partial=partial, team=team)
    outcomes = {}
    for key, each in methods.items():
        probe.scope = f"{key} {settings[key]}"
        try:
            outcomes[key] = each.calibrate(probe, settings[key])
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    outcome = merge(outcomes)
    for decisions in outcome.variants or (outcome.decisions,):
        resolve(decisions, spec)
    profile = Profile(
        name=name or method,
        method=method_record(method, parameters or {}),
        model=spec,
        decisions=outcome.decisions,
        router=outcome.router.named(f"{name or method}.router.safetensors") if outcome.router else None,
        calibration=Calibration(data=data_name, samples=len(drawn), seed=seed, curves=outcome.curves)
        if drawn
        else None,
        needs_adapted_weights=outcome.needs_adapted_weights,
    )
    return Calibrated(profiles=_members(profile, outcome), router=outcome.router)


def _members(profile: Profile, outcome: Outcome) -> tuple[Profile, ...]:
    """One Profile per variant, `name-0` and so on, as members of the choice `name`; or the only one."""
    if not outcome.variants:
        return (profile,)
    return tuple(
        msgspec.structs.replace(
            profile, name=f"{profile.name}-{number}", choice=profile.name, decisions=decisions
        )
        for number, decisions in enumerate(outcome.variants)
    )


def _single(every: Callable[P, Calibrated]) -> Callable[P, Profile]:
    """`calibrate_all` for methods that give one Profile and train nothing."""

    @wraps(every)
    def one(*args: P.args, **kwargs: P.kwargs) -> Profile:
        made = every(*args, **kwargs)
        assert made.router is None, "a trained router has to be saved: calibrate_all and save_calibrated"
        return made.profiles[0]

    return one


calibrate = _single(calibrate_all)


def method_record(method: str, parameters: Mapping[str, Any]) -> MethodRecord:
    """What a Profile says of its method: the name, and every parameter with the value that was used.

    Raises:
        UserError: an unknown method or parameter.
    """
    settings = read_parameters(find(method), parameters)
    used = {key: msgspec.json.decode(msgspec.json.encode(value)) for key, value in settings.items()}
    return MethodRecord(name=method, parameters=used if len(used) > 1 else used[method])


def read_parameters(methods: Mapping[str, Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """Each method's `Parameters`, from `name` or `method.name` to values (texts are converted).

    Raises:
        UserError: a parameter that no method has, or a value that it does not take.
    """
    by_method: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for key, value in given.items():
        owner, dot, field = key.rpartition(".")
        if not dot and len(methods) > 1:
            raise UserError(f"parameter {key!r}: say whose, as in {next(iter(methods))}.{key}")
        owner = owner if dot else next(iter(methods))
        if owner not in methods:
            raise UserError(f"parameter {key!r}: {owner!r} is not one of {', '.join(methods)}")
        fields = methods[owner].Parameters.__struct_fields__
        if field not in fields:
            raise UserError(f"parameter {key!r}: {owner} has {', '.join(fields) or 'no parameters'}")
        by_method[owner][field] = value
    settings = {}
    for name, values in by_method.items():
        try:
            settings[name] = msgspec.convert(values, methods[name].Parameters, strict=False)
        except (msgspec.ValidationError, UserError) as error:
            raise UserError(f"{name}: {error}") from None
    return settings


def _bound(spec: ModelSpec, method: str, drawn: Sequence[Sample], seed: int) -> dict[str, Any]:
    """What a measurement depends on besides what it is keyed by: its decisions, or a method's parameters."""
    import torch
    import transformers

    return {
        "model": spec.fingerprint,
        "method": method,
        "samples": len(drawn),
        "seed": seed,
        "data": digest(drawn),
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def open_probe(
    checkpoint: Path | str,
    spec: ModelSpec,
    samples: Sequence[Sample],
    *,
    progress: Progress | None = None,
    partial: Partial | None = None,
    team: Team = ALONE,
) -> Probe:
    """The model in float32, on the GPU where there is one; it is not loaded where nothing is measured."""
    import torch

    from trimvlm_calib.probe import Probe
    from trimvlm_export.checkpoint import tower
    from trimvlm_export.loading import Preparation, load_model

    geometry = tower(checkpoint, spec.grid)
    if not samples:
        return Probe(None, spec, [], progress, tower=geometry)
    inputs = PreparedSamples(samples, Preparation(Path(checkpoint), spec.grid))
    model = load_model(Path(checkpoint))
    device = f"cuda:{team.device % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    return Probe(model, spec, inputs, progress, partial=partial, team=team, tower=geometry)
