"""Compares methods at matched FLOPs on held-out questions, with confidence intervals per kind of question.

Writes results.json, results.md and accuracy.png to --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm_tools import console

TARGETS = (0.55, 0.30, 0.20)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm compare`."""
    parser.add_argument(
        "model", type=Path, nargs="?", metavar="MODEL", help="checkpoint directory (default: the demo model)"
    )
    parser.add_argument(
        "--data", default="demo", metavar="DIR", help="questions with answers; demo: generated scenes"
    )
    parser.add_argument("--calibration", metavar="DIR", help="samples to calibrate on (default: --data)")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="(default: every method)")
    parser.add_argument(
        "--targets", nargs="+", type=float, default=list(TARGETS), metavar="SHARE",
        help="shares of the dense model's FLOPs (default 0.55 0.30 0.20)",
    )  # fmt: skip
    parser.add_argument("--questions", type=int, default=500, metavar="N", help="(default 500)")
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="for calibration (default 20)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="METHOD.NAME=VALUE", dest="settings",
        help="a parameter that is not the published one; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("build/compare"), metavar="DIR", help="(default build/compare)"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Measures, writes and prints."""
    from trimvlm_tools.compare.run import run_comparison

    bad = [target for target in args.targets if not 0 < target < 1]
    if bad:
        raise UserError(f"--targets: {bad[0]} is not within 0 and 1 (excluded)")
    result = run_comparison(args)
    if args.json:
        console.emit(result)
    else:
        print((args.out / "results.md").read_text(), end="")
    return 0
