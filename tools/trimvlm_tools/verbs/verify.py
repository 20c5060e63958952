"""Check a bundle that was copied to a device: every file by its SHA-256, and every engine for this machine.

A change of the bundle that was interrupted as its files were put in place is finished first. Exits with 1
where a file is damaged, or where an engine for the target asked for does not fit this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools import console
from trimvlm_tools.arguments import target_name


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm verify`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--target", type=target_name, help="its engines must fit this machine; default: say which ones do"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints a line for each damaged file and each engine; 1 if there is one, or --target's do not fit."""
    from trimvlm.bundle import PENDING, Bundle
    from trimvlm.publishing import changing

    if (args.bundle / PENDING).is_dir():
        with changing(args.bundle):
            console.say(f"{args.bundle}: an interrupted change is finished")
    bundle = Bundle(args.bundle)
    with console.progress("verify", total=len(bundle.manifest.files)) as step:
        damaged = {name: bundle.remedy(name) for name in bundle.damaged(step)}
    engines = [] if damaged else engine_states(bundle, args.target)
    if args.json:
        console.emit({"files": len(bundle.manifest.files), "damaged": damaged, "engines": engines})
    else:
        print(f"{args.bundle}: {len(bundle.manifest.files)} files, {len(damaged) or 'none'} damaged")
        for name, remedy in damaged.items():
            print(f"  {name}: SHA-256 differs; {remedy}")
        for engine in engines:
            print(f"  {engine['profile']} for {engine['target']}: {engine['problem'] or 'fits this machine'}")
    unfit = args.target and any(engine["problem"] for engine in engines)
    return 1 if damaged or unfit else 0


def engine_states(bundle: Any, target: str | None) -> list[dict[str, str | None]]:
    """Each engine (of one target, or all) with what keeps it from running here, or None.

    Raises:
        UserError: no engine for `target`.
    """
    from trimvlm.binding import check_engine

    found: list[dict[str, str | None]] = []
    for profile, entry in bundle.manifest.profiles.items():
        for name, engine in entry.engines.items():
            if target not in (None, name):
                continue
            try:
                check_engine(bundle, profile, engine)
                problem = None
            except UserError as error:
                problem = str(error)
            found.append({"profile": profile, "target": name, "problem": problem})
    if target is not None and not found:
        raise UserError(
            f"{bundle.directory}: no engine for target {target!r}; make one with trimvlm build "
            f"{bundle.directory} --target {target}"
        )
    return found
