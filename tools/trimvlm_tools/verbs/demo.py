"""Runs the demo model through every step with seven methods: calibrate, export, build, run, check.

Prints one table and writes a report with pictures. What an earlier run made is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm demo`."""
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), metavar="DIR", help="(default build/demo)"
    )
    parser.add_argument(
        "--questions", type=int, default=200, metavar="N", help="held-out questions (default 200)"
    )
    parser.add_argument(
        "--target", default="ort-cpu", metavar="T", help="that runs the graphs: ort-cpu, ort-cpu-int4, ..."
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """1 if a parity verdict is not PASS."""
    from trimvlm_tools.demo.pipeline import METHODS, PARITY, demo
    from trimvlm_tools.demo.report import as_text_table, write_pictures, write_report

    if args.questions < PARITY:
        raise UserError(f"--questions: {args.questions} is too few, parity alone asks {PARITY}")
    with console.progress("demo", total=4 * len(METHODS)) as step:
        result = demo(args.out, questions=args.questions, target=args.target, step=step)
    write_report(result, args.out / "report.html")
    write_pictures(result, args.out)
    if args.json:
        console.emit(result)
    else:
        print(as_text_table(result))
        print(f"\nreport: {args.out / 'report.html'}")
        print(
            f"your own picture: trimvlm run {args.out / 'bundle'} --profile fastv --image FILE "
            '--prompt "what color is the top left object ?"'
        )
    return 0 if all(method.parity.verdict == "PASS" for method in result.methods) else 1
