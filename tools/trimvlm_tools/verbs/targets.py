"""List the devices that a bundle can be built for, or show the ones of your own YAML files.

`tested` says how far each has been taken: run (built and executed), built (ahead of time, without the
device), or not yet run.
"""

from __future__ import annotations

import argparse

from trimvlm_tools import console

HEADER = ("target", "device", "library", "SM", "lowering", "precision", "memory GB", "GB/s", "tested")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm targets`."""
    parser.add_argument(
        "targets", nargs="*", metavar="TARGET", help="names or YAML files; default: all shipped"
    )
    parser.add_argument("--json", action="store_true", help="the targets in full, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    from trimvlm_engines import targets

    found = [targets.load(name) for name in args.targets] or targets.shipped()
    if args.json:
        console.emit(found)
        return 0
    rows = [
        (
            target.name,
            target.device,
            f"{target.backend} {target.versions}",
            target.compute_capability,
            target.lowering,
            ", ".join(target.dtypes),
            target.memory_gb,
            target.bandwidth_gb_s,
            target.tested,
        )
        for target in found
    ]
    print(console.table(HEADER, rows))
    return 0
