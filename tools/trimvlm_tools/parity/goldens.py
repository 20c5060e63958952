"""Goldens: what the reference computed for a few questions, so that a device without torch can check itself.

Kept in the bundle as small readable JSON; numbers that are compared are written with `float.hex()`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from trimvlm.bundle import Bundle, Entry, record, write_whole
from trimvlm.errors import UserError
from trimvlm.manifest import read_manifest
from trimvlm.opening import ORT_CPU
from trimvlm.parity import Metric, ParityReport, Rung
from trimvlm.publishing import STAGED, changing, publish
from trimvlm.schedule import Schedule
from trimvlm.session import Session
from trimvlm.value import Value
from trimvlm_calib.samples import Sample
from trimvlm_tools.parity.answer import Answer
from trimvlm_tools.parity.choices import choices, thresholds_of
from trimvlm_tools.parity.compare import LIMITS, OF_LARGEST, max_abs, max_share

TOP = 8  # logits kept per step


class Made(Value, frozen=True, kw_only=True):
    """One choice: the rows chosen, and how far the scores were from another choice (see `Choice`)."""

    rows: tuple[int, ...]
    gap: str


class Case(Value, frozen=True, kw_only=True):
    """One question.

    Attributes:
        choices: by name, see `choices.py`.
        logits: `logits[step]` maps token ids to float32 values, the highest `TOP` of the reference.
    """

    image: str
    question: str
    tokens: tuple[int, ...]
    choices: dict[str, Made]
    logits: tuple[dict[str, str], ...]


class Goldens(Value, frozen=True, kw_only=True):
    """All cases of one profile."""

    schema: Literal[2] = 2
    profile_digest: str
    data: str
    versions: dict[str, str]
    cases: tuple[Case, ...]


def case_of(image: str, question: str, answer: Answer, thresholds: Mapping[int, float]) -> Case:
    """Keeps what is compared of a reference answer."""
    return Case(
        image=image,
        question=question,
        tokens=tuple(answer.tokens),
        choices={
            name: Made(rows=choice.rows, gap=choice.gap.hex())
            for name, choice in choices(answer, thresholds).items()
        },
        logits=tuple(
            {
                str(token): float(step[token]).hex()
                for token in np.argsort(-step, kind="stable")[:TOP].tolist()
            }
            for step in answer.logits
        ),
    )


def write_goldens(
    bundle: Bundle, profile: str, answers: Sequence[tuple[Sample, Answer]], report: ParityReport
) -> Path:
    """Adds goldens, with their images, to a bundle.

    Returns:
        The file written.
    """
    directory, file = bundle.directory, f"{profile}.goldens.json"
    schedule = Schedule.resolve(bundle.profile(profile), bundle.manifest.profiles[profile].model)
    thresholds = thresholds_of(schedule)
    with changing(directory):
        staged = Path(tempfile.mkdtemp(dir=directory, prefix=STAGED))
        (staged / "goldens").mkdir()
        cases, written = [], [file]
        for sample, answer in answers:
            name = f"goldens/{profile}-{len(cases)}{sample.image.suffix}"
            shutil.copyfile(sample.image, staged / name)
            cases.append(case_of(name, sample.question, answer, thresholds))
            written.append(name)
        goldens = Goldens(
            profile_digest=bundle.profile(profile).digest,
            data=report.data,
            versions=report.versions,
            cases=tuple(cases),
        )
        write_whole(staged / file, msgspec.json.format(msgspec.json.encode(goldens), indent=1) + b"\n")
        manifest = read_manifest(directory)  # may have gained engines since the bundle was opened
        entry: Entry = msgspec.structs.replace(manifest.profiles[profile], goldens=file)
        changed = msgspec.structs.replace(
            manifest,
            profiles={**manifest.profiles, profile: entry},
            files={**manifest.files, **{name: record(staged / name) for name in written}},
        )
        publish(directory, staged, changed)
    return directory / file


def check_goldens(bundle: Bundle, profile: str | None, target: str = ORT_CPU) -> ParityReport:
    """Compares a target with the goldens; needs neither torch nor the data they were made from.

    Raises:
        UserError: the bundle has no goldens for this profile, or they are of another version of it.
    """
    name, entry = bundle.entry(profile)
    if entry.goldens is None:
        raise UserError(
            f"{bundle.directory}: profile {name} has no goldens; write them on the workstation with "
            f"trimvlm check {bundle.directory} --profile {name} --write-goldens"
        )
    try:
        goldens = msgspec.json.decode(bundle.path(entry.goldens).read_bytes(), type=Goldens)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{entry.goldens}: written by another version of trimvlm ({error}); write them again with "
            f"trimvlm check {bundle.directory} --profile {name} --write-goldens"
        ) from None
    if goldens.profile_digest != bundle.profile(name).digest:
        raise UserError(f"{entry.goldens}: made for another version of profile {name}; write them again")
    limits = LIMITS[bundle.manifest.dtype]
    differ, kind = (max_share, OF_LARGEST) if limits.relative else (max_abs, "")
    worst, other_tokens, other_rows, unexplained = 0.0, 0, 0, 0
    with Session.open(bundle, name, target) as session:
        for case in goldens.cases:
            rows = session.prompt(case.question, 1)
            visual = session.visual([bundle.path(case.image)])
            outputs = session.prefill(rows, visual.rows, patches=visual.chosen)
            other = [
                (float.fromhex(made.gap), choice)
                for choice, made in case.choices.items()
                if made.rows != _rows(choice, outputs, visual.chosen)
            ]
            other_rows += len(other)
            unexplained += bool(other) and other[0][0] > limits.margin(other[0][1])
            for step, (token, wanted) in enumerate(zip(case.tokens, case.logits, strict=True)):
                logits = outputs["logits"][0]
                theirs = np.array([float.fromhex(value) for value in wanted.values()])
                worst = max(worst, differ(logits[[int(key) for key in wanted]], theirs))
                other_tokens += int(logits.argmax()) != token
                if step + 1 < len(case.tokens):
                    outputs = session.step(token, outputs)
    tie = other_rows > 0 and unexplained == 0
    metrics = (
        Metric(name="choices that differ", value=float(other_rows), limit=0.0, ambiguous=tie),
        Metric(name=f"top {TOP} logits max abs{kind}", value=worst, limit=limits.logits, ambiguous=tie),
        Metric(name="greedy tokens that differ", value=float(other_tokens), limit=0.0, ambiguous=tie),
    )
    return ParityReport(
        profile=name,
        dtype=bundle.manifest.dtype,
        samples=len(goldens.cases),
        data=f"goldens ({goldens.data})",
        versions=goldens.versions,
        rungs=(Rung(name=f"reference (goldens) -> {target}", metrics=metrics),),
    )


def _rows(name: str, outputs: Mapping[str, np.ndarray], patches: Sequence[np.ndarray]) -> tuple[int, ...]:
    """What a run chose under a name of `choices.py`."""
    kind, _, number = name.partition(".")
    found = patches[int(number)] if kind == "patches" else outputs[name]
    return tuple((np.flatnonzero(found) if kind == "present_visible" else found).tolist())
