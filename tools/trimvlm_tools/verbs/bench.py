"""Measure times and memory, turn by turn, one process per contender.

  trimvlm bench BUNDLE                    the steps of an answer, for every profile of the bundle
  trimvlm bench --geometry llava-1b       decoders of every method, answers, memory, size, on random weights
  trimvlm bench --geometry llava-1b --against openvino-genai llama.cpp --visual 64 576 2880 --plot DIR
                                          also peers, for several prompts, with plots
  trimvlm bench --geometry llava-1b --against openvino-genai --prepare
                                          make what that needs, and run nothing

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
    parser.add_argument("--profiles", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--runs", type=int, default=7, help="counted rounds of each process (default: 7)")
    parser.add_argument("--processes", type=int, default=3, help="of each contender, in turn (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON to FILE")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="with --geometry: write plots (PNG) to DIR")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    geometry = parser.add_argument_group("with --geometry")
    geometry.add_argument(
        "--geometry", metavar="NAME", help="llava-1b, onevision-0.5b, d1024, or tiny to try the command out"
    )
    geometry.add_argument(
        "--against", nargs="+", default=[], metavar="PEER", help="peers (docs/benchmarks.md)"
    )
    geometry.add_argument(
        "--visual", nargs="+", type=int, default=[], metavar="N", help="visual rows to sweep"
    )
    geometry.add_argument("--text", nargs="+", type=int, default=[], metavar="N", help="text rows to sweep")
    geometry.add_argument("--new-tokens", type=int, default=128, help="tokens of each answer (default: 128)")
    geometry.add_argument(
        "--prepare", action="store_true", help="export and convert for this precision, run nothing"
    )
    geometry.add_argument(
        "--decoders-only", action="store_true", help="no whole answers and no memory of a session"
    )
    geometry.add_argument(
        "--operators", nargs="+", default=[], metavar="NAME", help="also where time goes in these profiles"
    )
    geometry.add_argument("--precision", choices=("fp32", "int4"), default="fp32", help="of the weights")
    answer = parser.add_argument_group("with BUNDLE")
    answer.add_argument(
        "--target", type=target_name, default="ort-cpu", help="what to run on (default: ort-cpu)"
    )
    answer.add_argument("--image", type=Path, help="the picture to ask about (default: noise)")
    answer.add_argument("--prompt", help="the question")
    answer.add_argument("--tokens", type=int, default=16, help="at most so many (default: 16)")
    answer.add_argument("--memory", action="store_true", help="memory of each profile's session as well")


def run(args: argparse.Namespace) -> int:
    """Measures and reports."""
    _check(args)
    from trimvlm_tools.bench.report import as_data
    from trimvlm_tools.bench.tables import as_text

    if args.prepare:
        return _prepare(args)
    report = _geometry(args) if args.geometry else _bundle(args)
    if args.out:
        import msgspec

        from trimvlm.bundle import write_whole

        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, msgspec.json.format(msgspec.json.encode(as_data(report)), indent=2) + b"\n")
    if args.plot:
        from trimvlm_tools.bench.plots import draw

        for path in draw(report, args.plot):
            console.say(f"{path}: written")
    if args.json:
        console.emit(as_data(report))
    else:
        print(as_text(report))
    return 0 if report.good else 1


def _check(args: argparse.Namespace) -> None:
    from trimvlm_tools.bench.decisions import DENSE, METHODS, QUARTER

    if (args.bundle is None) == (args.geometry is None):
        raise UserError("give either BUNDLE or --geometry NAME")
    for name in ("runs", "processes", "threads", "tokens", "new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is not a positive number")
    for name, least in (("visual", 16), ("text", 3)):
        if small := [value for value in getattr(args, name) if value < least]:
            raise UserError(f"--{name}: {small[0]} rows are too few; give at least {least}")
    if args.bundle is not None:
        for name in ("against", "decoders_only", "operators", "plot", "prepare"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')}: goes with --geometry only")
    known = {DENSE, *args.profiles} if args.profiles else {*METHODS} - {*QUARTER}
    if unknown := [name for name in args.operators if name not in known]:
        raise UserError(f"--operators: {unknown[0]!r} does not run; choose from {', '.join(sorted(known))}")


def _geometry(args: argparse.Namespace):
    from trimvlm_tools.bench.geometry import find_geometry
    from trimvlm_tools.bench.run_geometry import bench_geometry

    return bench_geometry(
        find_geometry(args.geometry),
        _plan(args),
        text=args.text,
        new_tokens=args.new_tokens,
        threads=args.threads,
        runs=args.runs,
        processes=args.processes,
        operators=args.operators,
        sessions=not args.decoders_only,
    )


def _prepare(args: argparse.Namespace) -> int:
    from trimvlm_tools.bench.geometry import find_geometry
    from trimvlm_tools.bench.prepare import prepare_geometry

    peers = prepare_geometry(find_geometry(args.geometry), _plan(args))
    if args.json:
        console.emit(peers)
        return 1 if any(peers.values()) else 0
    for name, error in peers.items():
        print(f"{name} FAILED: {error}" if error else f"{name}: ready")
    return 1 if any(peers.values()) else 0


def _plan(args: argparse.Namespace):
    from trimvlm_tools.bench.prepare import Plan

    return Plan(
        against=tuple(args.against),
        methods=tuple(args.profiles),
        visual=tuple(args.visual),
        precision=args.precision,
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
        processes=args.processes,
    )
