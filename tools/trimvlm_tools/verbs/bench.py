"""Measure times and memory, turn by turn, one process per contender.

  trimvlm bench BUNDLE                    the steps of an answer, for every profile of the bundle
  trimvlm bench --geometry d1024          prefill of every method, memory and size, on random weights
  trimvlm bench --geometry d1024 --against transformers
                                          also dense against transformers' own ONNX exporter

With --geometry, exits with 1 when a contender failed or a bar was missed. Ratios are medians over rounds; let
nothing else run meanwhile (the report says how busy other work was).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm_tools import console
from trimvlm_tools.arguments import target_name


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="a bundle's directory")
    parser.add_argument("--geometry", metavar="NAME", help="d1024, or tiny to try the command out")
    parser.add_argument("--profiles", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--against", choices=("transformers",), help="with --geometry: a peer")
    parser.add_argument("--runs", type=int, default=20, help="counted rounds (default: 20)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    parser.add_argument(
        "--target", type=target_name, default="ort-cpu", help="with BUNDLE: what to run on (default: ort-cpu)"
    )
    parser.add_argument("--image", type=Path, help="with BUNDLE: the picture to ask about (default: noise)")
    parser.add_argument("--prompt", help="with BUNDLE: the question")
    parser.add_argument("--tokens", type=int, default=16, help="with BUNDLE: at most so many (default: 16)")
    parser.add_argument("--memory", action="store_true", help="with BUNDLE: memory of each profile as well")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON to FILE")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Measures and reports."""
    if (args.bundle is None) == (args.geometry is None):
        raise UserError("give either BUNDLE or --geometry NAME")
    for name in ("runs", "threads", "tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)} is not a positive number")
    if args.bundle is not None and args.against:
        raise UserError("--against: compares with --geometry only")
    from trimvlm_tools.bench.report import as_text

    report = _geometry(args) if args.geometry else _bundle(args)
    if args.out:
        import msgspec

        from trimvlm.bundle import write_whole

        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    if args.json:
        console.emit(report)
    else:
        print(as_text(report))
    return 0 if report.good else 1


def _geometry(args: argparse.Namespace):
    from trimvlm_tools.bench.geometry import find_geometry
    from trimvlm_tools.bench.run_geometry import bench_geometry

    return bench_geometry(
        find_geometry(args.geometry),
        against=args.against,
        methods=args.profiles,
        threads=args.threads,
        runs=args.runs,
        cache=Path("build/bench"),
    )


def _bundle(args: argparse.Namespace):
    from trimvlm_tools.bench.run_bundle import bench_bundle
    from trimvlm_tools.bench.stages import PROMPT

    return bench_bundle(
        args.bundle,
        profiles=args.profiles,
        target=args.target,
        image=args.image,
        prompt=args.prompt or PROMPT,
        tokens=args.tokens,
        memory=args.memory,
        threads=args.threads,
        runs=args.runs,
    )
