"""From the command's arguments to a comparison on disk."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from trimvlm.bundle import write_whole
from trimvlm.errors import UserError
from trimvlm_calib.calibrate import open_probe
from trimvlm_calib.methods import discover, find
from trimvlm_calib.samples import Sample, draw, load_samples
from trimvlm_export.checkpoint import model_spec
from trimvlm_tools import console
from trimvlm_tools.bench.machine import fingerprint
from trimvlm_tools.compare.pipeline import DENSE, Comparison, compare
from trimvlm_tools.compare.report import accuracy_figure, as_markdown
from trimvlm_tools.demo_data import write_samples
from trimvlm_tools.demo_model import CHECKPOINT

# Beside the single methods: compositions that the papers measure.
COMPOSITIONS = ("fastv+v-skip", "msv-prune+asl-skip", "msv-prune+v-skip")


def run_comparison(args: argparse.Namespace) -> Comparison:
    """Reads data, compares and writes results.json, results.md and accuracy.png to `args.out`.

    Raises:
        UserError: an unknown method or parameter, no model, or questions without answers.
    """
    checkpoint = args.model or CHECKPOINT
    methods = args.methods or [*(name for name in discover() if name != DENSE), *COMPOSITIONS]
    for method in methods:
        find(method)
    overrides = _overrides(args.settings)
    args.out.mkdir(parents=True, exist_ok=True)
    questions, kinds, calibration = _data(args)
    shutil.rmtree(args.out / "bundle", ignore_errors=True)  # its profiles may be another run's
    with console.progress("compare", total=1 + len(methods) * len(args.targets)) as step:
        probe = open_probe(checkpoint, model_spec(checkpoint), draw(calibration, args.samples, seed=0))
        result = compare(
            checkpoint,
            probe,
            questions,
            kinds,
            args.out,
            methods=methods,
            targets=args.targets,
            overrides=overrides,
            text=_text_rows(probe.inputs, probe.spec.visual_tokens),
            machine=msgspec.to_builtins(fingerprint()),
            step=step,
        )
    encoded = msgspec.json.format(msgspec.json.encode(result), indent=2)
    write_whole(args.out / "results.json", encoded + b"\n")
    write_whole(args.out / "results.md", as_markdown(result).encode())
    accuracy_figure(result).savefig(args.out / "accuracy.png", dpi=110)
    return result


def _data(args: argparse.Namespace) -> tuple[list[Sample], list[str], list[Sample]]:
    """Questions with answers, their kinds, and samples to calibrate on."""
    if args.data == "demo":
        folder = write_samples(args.out / "held-out", "test", args.questions)
        calibration = write_samples(args.out / "calibration", "calib", args.samples)
    else:
        folder, calibration = Path(args.data), Path(args.calibration or args.data)
    samples, kinds = load_samples(folder), _kinds(folder)
    if missing := [sample for sample in samples if sample.answer is None]:
        raise UserError(f"{folder}: no answer to {missing[0].question!r}; a comparison needs answers")
    count = min(args.questions, len(samples))
    return samples[:count], kinds[:count], load_samples(calibration)


def _kinds(folder: Path) -> list[str]:
    """The `kind` of each question, `all` where there is none."""
    lines = (folder / "questions.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line).get("kind", "all") for line in lines if line.strip()]


def _text_rows(inputs: Sequence[Mapping[str, Any]], visual_tokens: int) -> int:
    """Median number of text rows of the calibration prompts, which hold one image each."""
    return round(median(each["input_ids"].shape[1] - visual_tokens for each in inputs))


def _overrides(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`method.name=value` to values by method and name."""
    import yaml

    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        method, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise UserError(f"--set: {setting!r} is not METHOD.NAME=VALUE")
        if name not in next(iter(find(method).values())).Parameters.__struct_fields__:
            raise UserError(f"--set: {method} has no parameter {name!r}; trimvlm methods lists them")
        found.setdefault(method, {})[name] = yaml.safe_load(value)
    return found
