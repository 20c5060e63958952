"""Build a bundle's engines for a target, and record them in the bundle.

For `ort-cpu` the graphs themselves run: they are loaded and run once. For a GPU a plan is built; what is
already there and up to date is kept. TensorRT-RTX plans are built ahead of time, without the GPU; classic
TensorRT plans on the device itself. Largest sizes (images, text, new tokens) are `limits` in the target's
YAML: copy a shipped one and change it for your own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm build`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `trimvlm export` wrote")
    parser.add_argument(
        "--target",
        default="ort-cpu",
        help="name (`trimvlm targets`) or a .yaml of your own; default: ort-cpu",
    )
    parser.add_argument("--profile", help="build this profile only; default: all of the bundle's")
    parser.add_argument("--json", action="store_true", help="the engines as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Builds each profile in turn."""
    from trimvlm_engines import record, targets
    from trimvlm_engines.build import build

    target = targets.load(args.target)
    names = [args.profile] if args.profile else sorted(record.open_bundle(args.bundle).manifest.profiles)
    engines, kept = {}, {}
    with console.progress(f"build for {target.name}", total=2 * len(names)) as step:

        def tell(role: str, state: str) -> None:
            if state != "building":
                kept.setdefault(name, {})[role] = state == "up to date"
                step(f"{name} {role} {state}")

        for name in names:
            engines[name] = build(args.bundle, target, name, tell=tell)
    if args.json:
        console.emit({"engines": engines, "up_to_date": kept})
        return 0
    rows = [
        (
            name,
            role,
            "up to date" if kept[name][role] else "built",
            engine.graphs[role],
            _whole(engine.measured.get(f"{role}_bytes")),
            engine.measured.get(f"{role}_seconds"),
        )
        for name, engine in engines.items()
        for role in engine.graphs
    ]
    print(f"{target.name}: {target.device}, {target.backend} {next(iter(engines.values())).version}")
    print(console.table(("profile", "part", "state", "file", "bytes", "seconds"), rows))
    return 0


def _whole(number: float | None) -> int | None:
    """The manifest keeps measurements as floats; bytes are shown in full."""
    return None if number is None else int(number)
