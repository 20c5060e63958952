"""Goldens: what the reference computed for a few questions, so that a device without torch can check itself.

Kept in the bundle as small readable JSON; numbers that are compared are written with `float.hex()`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from trimvlm.bundle import Bundle, Entry, record, write_manifest, write_whole
from trimvlm.errors import UserError
from trimvlm.parity import Metric, ParityReport, Rung
from trimvlm.session import ORT_CPU, Session
from trimvlm.value import Value
from trimvlm_calib.samples import Sample
from trimvlm_tools.parity.compare import LIMITS, Answer, score_gap

TOP = 8  # logits kept per step


class Stage(Value, frozen=True, kw_only=True):
    """One selection: surviving visual rows, and how far the cut was from a tie."""

    selected: tuple[int, ...]
    score_gap: str


class Case(Value, frozen=True, kw_only=True):
    """One question: `logits[step]` maps token ids to float32 values, the highest `TOP` of the reference."""

    image: str
    question: str
    tokens: tuple[int, ...]
    stages: tuple[Stage, ...]
    logits: tuple[dict[str, str], ...]


class Goldens(Value, frozen=True, kw_only=True):
    """All cases of one profile."""

    schema: int = 1
    profile_digest: str
    data: str
    versions: dict[str, str]
    cases: tuple[Case, ...]


def case_of(image: str, question: str, answer: Answer) -> Case:
    """Keeps what is compared of a reference answer."""
    return Case(
        image=image,
        question=question,
        tokens=tuple(answer.tokens),
        stages=tuple(
            Stage(selected=tuple(rows.tolist()), score_gap=score_gap(scores, len(rows)).hex())
            for rows, scores in zip(answer.selected, answer.scores, strict=True)
        ),
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
    manifest, directory = bundle.manifest, bundle.directory
    (directory / "goldens").mkdir(exist_ok=True)
    cases, written = [], []
    for sample, answer in answers:
        name = f"goldens/{profile}-{len(cases)}{sample.image.suffix}"
        shutil.copyfile(sample.image, directory / name)
        cases.append(case_of(name, sample.question, answer))
        written.append(name)
    goldens = Goldens(
        profile_digest=bundle.profile(profile).digest,
        data=report.data,
        versions=report.versions,
        cases=tuple(cases),
    )
    file = f"{profile}.goldens.json"
    write_whole(directory / file, msgspec.json.format(msgspec.json.encode(goldens), indent=1) + b"\n")
    entry: Entry = msgspec.structs.replace(manifest.profiles[profile], goldens=file)
    files = {**manifest.files, **{name: record(directory / name) for name in [*written, file]}}
    changed = msgspec.structs.replace(manifest, profiles={**manifest.profiles, profile: entry}, files=files)
    write_manifest(directory, changed)
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
    goldens = msgspec.json.decode(bundle.path(entry.goldens).read_bytes(), type=Goldens)
    if goldens.profile_digest != bundle.profile(name).digest:
        raise UserError(f"{entry.goldens}: made for another version of profile {name}; write them again")
    limits = LIMITS[bundle.manifest.dtype]
    worst, other_tokens, other_rows, unexplained = 0.0, 0, 0, 0
    with Session.open(bundle, name, target) as session:
        for case in goldens.cases:
            rows = session.prompt(case.question, 1)
            outputs = session.prefill(rows, session.vision([bundle.path(case.image)]))
            for stage, expected in enumerate(case.stages):
                if outputs[f"selected.{stage}"].tolist() != list(expected.selected):
                    other_rows += 1
                    unexplained += float.fromhex(expected.score_gap) > limits.score_margin
            for step, (token, wanted) in enumerate(zip(case.tokens, case.logits, strict=True)):
                logits = outputs["logits"][0]
                gaps = [abs(float(logits[int(key)]) - float.fromhex(value)) for key, value in wanted.items()]
                worst = max(worst, *gaps)
                other_tokens += int(logits.argmax()) != token
                if step + 1 < len(case.tokens):
                    outputs = session.step(token, outputs)
    tie = other_rows > 0 and unexplained == 0
    metrics = (
        Metric(name="selections that differ", value=float(other_rows), limit=0.0, ambiguous=tie),
        Metric(name=f"top {TOP} logits max abs", value=worst, limit=limits.logits, ambiguous=tie),
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
