"""List the devices that a bundle can be built for, or show some of them in full.

The last three columns say what has been done on each: plans built, a plan or graph run, its time or memory
measured. `never` means what it says.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from trimvlm_tools import console

if TYPE_CHECKING:
    from trimvlm.target import Target

HEADER = (
    *("target", "device", "system", "library", "SM", "lowering"),
    *("memory GB", "GB/s", "built", "run", "measured"),
)
NEVER = "never"


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm targets`."""
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="TARGET",
        help="names or YAML files to show in full; default: a list of all",
    )
    parser.add_argument("--json", action="store_true", help="the targets in full, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints the list, or one block per target."""
    from trimvlm_engines import targets

    found = [targets.load(name) for name in args.targets] or targets.shipped()
    if args.json:
        console.emit(found)
    elif args.targets:
        print("\n\n".join(block(target) for target in found))
    else:
        print(console.table(HEADER, [row(target) for target in found]))
        print("\nTARGET as an argument shows one in full; --target ./my-board.yaml takes one of your own.")
    return 0


def row(target: Target) -> tuple[object, ...]:
    """One line of the list; what was done is a yes here, and with what is in the block."""
    done = target.tested
    built = None if target.backend == "onnxruntime" else _yes(done.built)
    return (
        target.name,
        target.device,
        target.system.partition(" (")[0],
        f"{target.backend} {target.versions}",
        target.compute_capability,
        target.lowering,
        target.memory_gb,
        target.bandwidth_gb_s,
        built,
        _yes(done.run),
        _yes(done.measured),
    )


def block(target: Target) -> str:
    """Every field of one target."""
    fields: list[tuple[str, object]] = []
    for name in target.__struct_fields__:
        value = getattr(target, name)
        if name in ("limits", "plan", "tested"):
            empty = NEVER if name == "tested" else None
            fields += [
                (f"{name}.{part}", empty if (inner := getattr(value, part)) is None else inner)
                for part in value.__struct_fields__
            ]
        else:
            fields.append((name, ", ".join(value) if isinstance(value, tuple) else value))
    width = max(len(name) for name, _ in fields)
    return "\n".join(f"{name:<{width}}  {_said(value)}" for name, value in fields)


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _yes(done: str | None) -> str:
    return "yes" if done else NEVER
