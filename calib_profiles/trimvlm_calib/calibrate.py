"""`trimvlm calibrate` as a function: from a checkpoint, a method and samples to a Profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from trimvlm.errors import UserError
from trimvlm.profile import Calibration, Profile, check_name
from trimvlm.profile import Method as MethodRecord
from trimvlm.schedule import resolve
from trimvlm_calib.methods import Method, find
from trimvlm_calib.outcome import merge
from trimvlm_calib.samples import Sample, draw, model_inputs

if TYPE_CHECKING:
    from trimvlm.profile import ModelSpec
    from trimvlm_calib.probe import Probe, Progress


def calibrate(
    checkpoint: Path | str,
    method: str,
    samples: Sequence[Sample],
    parameters: Mapping[str, Any] | None = None,
    *,
    data_name: str,
    count: int | None = None,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Calibrates a method on a model.

    Args:
        checkpoint: directory of a Hugging Face LLaVA.
        method: a name, or several as in `fastv+v-skip`: each is calibrated on the dense model, and their
            decisions are united.
        samples: what to draw from.
        parameters: by name (`keep`), or where there are several methods with the method's (`fastv.keep`).
        data_name: recorded in the Profile.
        count: how many samples to draw; None: as many as the paper took, or all where there are fewer.
        seed: decides which, and in what order.
        name: the Profile's; None: the method's.
        progress: called as `progress(what, done, total)`.

    Raises:
        UserError: an unknown method or parameter, no model there, too few samples, an unreadable image,
            curves that decide nothing, or decisions that cannot be united.
    """
    from trimvlm_export.checkpoint import model_spec

    check_name(name or method)
    methods = find(method)
    settings = read_parameters(methods, parameters or {})
    spec = model_spec(checkpoint)
    wanted = max(each.SAMPLES for each in methods.values())
    drawn = draw(samples, min(wanted, len(samples)) if count is None else count, seed) if wanted else []
    probe = _probe(checkpoint, spec, drawn, progress)
    outcomes = {}
    for key, each in methods.items():
        try:
            outcomes[key] = each.calibrate(probe, settings[key])
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    outcome = merge(outcomes)
    resolve(outcome.decisions, spec)
    return Profile(
        name=name or method,
        method=method_record(method, parameters or {}),
        model=spec,
        decisions=outcome.decisions,
        calibration=Calibration(data=data_name, samples=len(drawn), seed=seed, curves=outcome.curves)
        if drawn
        else None,
        needs_adapted_weights=outcome.needs_adapted_weights,
    )


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


def _probe(
    checkpoint: Path | str, spec: ModelSpec, samples: Sequence[Sample], progress: Progress | None
) -> Probe:
    """The model in float32, on the GPU where there is one; it is not loaded where nothing is measured."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from trimvlm_calib.probe import Probe

    if not samples:
        return Probe(None, spec, [], progress)
    processor = AutoProcessor.from_pretrained(checkpoint, local_files_only=True)
    inputs = [model_inputs(sample, processor) for sample in samples]
    model: Any = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, local_files_only=True
    )
    return Probe(model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), spec, inputs, progress)
