"""Measures a bundle against the PyTorch reference, rung by rung; exits with 1 when a gate fails.

dense HF -> reference (the Hugging Face model, masked) -> exported graph on ONNX Runtime -> engine
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.parity import ParityReport
from trimvlm_tools import console
from trimvlm_tools.arguments import target_name

GOLDENS = 4


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm check`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--profile", action="append", metavar="NAME", help="which (default: every profile)")
    parser.add_argument(
        "--data", default="demo", metavar="DIR", help="folder with questions.jsonl, or demo (held-out scenes)"
    )
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="questions (default 20)")
    parser.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="of each answer (16)")
    parser.add_argument(
        "--write-goldens", action="store_true", help=f"keep {GOLDENS} questions in the bundle for --goldens"
    )
    parser.add_argument(
        "--goldens",
        action="store_true",
        help="compare with the bundle's goldens, without torch",
    )
    parser.add_argument(
        "--target",
        type=target_name,
        default="ort-cpu",
        metavar="T",
        help="that runs the graph; without --goldens one of ONNX Runtime's (default ort-cpu)",
    )
    parser.add_argument(
        "--polygraphy",
        type=Path,
        metavar="DIR",
        help="with --goldens: write what each graph is fed and gives on a golden question, for NVIDIA's "
        "`polygraphy run --load-inputs --load-outputs`",
    )
    parser.add_argument("--json", action="store_true", help="the reports as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints a report per profile; 1 if any verdict is not PASS."""
    from trimvlm_tools.parity.text import as_text

    if args.samples < 1:
        raise UserError(f"--samples: {args.samples} is not a positive number")
    if args.polygraphy and not args.goldens:
        raise UserError("--polygraphy: goes with --goldens, which are what it writes")
    if args.write_goldens and args.target != "ort-cpu":
        raise UserError("--write-goldens: goldens are of the checkpoint's own weights; leave out --target")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {args.max_new_tokens} is not a positive number")
    bundle = Bundle(args.bundle)
    names = [bundle.entry(name)[0] for name in args.profile or sorted(bundle.manifest.profiles)]
    reports = from_goldens(bundle, names, args) if args.goldens else from_reference(bundle, names, args)
    if args.json:
        console.emit(reports)
    else:
        print("\n\n".join(as_text(report) for report in reports))
        if args.polygraphy and passed(reports):
            print(f"\n{args.polygraphy}: inputs and outputs of {', '.join(names)} for polygraphy run")
    return 0 if passed(reports) else 1


def passed(reports: list[ParityReport]) -> bool:
    """Whether every verdict is PASS."""
    return all(report.verdict == "PASS" for report in reports)


def from_goldens(bundle: Bundle, names: list[str], args: argparse.Namespace) -> list[ParityReport]:
    """Compares with what the reference computed on the workstation; what passed is written for Polygraphy."""
    from trimvlm_tools.parity.goldens import check_goldens
    from trimvlm_tools.parity.recording import write_polygraphy

    reports = [check_goldens(bundle, name, args.target) for name in names]
    if args.polygraphy and passed(reports):
        for name in names:
            write_polygraphy(bundle, name, args.target, args.polygraphy)
    return reports


def from_reference(bundle: Bundle, names: list[str], args: argparse.Namespace) -> list[ParityReport]:
    """Climbs the whole ladder."""
    from trimvlm_calib.samples import draw, load_samples
    from trimvlm_tools.demo_data import demo_samples
    from trimvlm_tools.parity.check import HuggingFace, check
    from trimvlm_tools.parity.quantized import quantized

    reports: list[ParityReport] = []
    loaded: dict[Any, HuggingFace] = {}
    with demo_samples(args.data, "test", args.samples) as folder:
        questions = draw(load_samples(folder), args.samples, seed=0)
        for name in names:
            entry = bundle.entry(name)[1]
            key = entry.model.grid, quantized(entry, args.target)
            if key not in loaded:
                loaded = {key: HuggingFace(bundle, *key)}
            with console.progress(f"check {name}", total=len(questions)) as advance:
                goldens = GOLDENS if args.write_goldens else 0
                report = check(
                    bundle,
                    name,
                    questions,
                    data=args.data,
                    max_new_tokens=args.max_new_tokens,
                    advance=advance,
                    goldens=goldens,
                    hf=loaded[key],
                    target=args.target,
                )
                reports.append(report)
                bundle = Bundle(args.bundle)  # its manifest may have gained goldens
    return reports
