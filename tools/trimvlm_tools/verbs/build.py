"""Build a bundle's engines for a target, and record them in the bundle.

For `ort-cpu` the graphs themselves run: they are loaded and run once. For a GPU a plan is built; what is
already there and up to date is kept. TensorRT-RTX plans are built ahead of time, without the GPU; classic
TensorRT plans on the device itself. Largest sizes (images, text, new tokens) are `limits` in the target's
YAML: copy a shipped one and change it for your own.

Ctrl-C leaves the bundle as it was. With --explain nothing is built: it prints the commands of trtexec,
tensorrt_rtx and Polygraphy that build the same plans into the current directory.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trimvlm_tools import console

if TYPE_CHECKING:
    from trimvlm.target import Target
    from trimvlm_engines.progress import Progress


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm build`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `trimvlm export` wrote")
    parser.add_argument(
        "--target",
        default="ort-cpu",
        help="name (`trimvlm targets`) or a .yaml of your own; default: ort-cpu",
    )
    parser.add_argument(
        "--no-empty-tensors",
        action="store_true",
        help="build the decoder without empty tensors (`trimvlm export --no-empty-tensors`), for a library "
        "that refuses to execute them; as `empty_tensors: false` in the target's YAML",
    )
    parser.add_argument("--profile", help="build this profile only; default: all of the bundle's")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="build nothing; print the commands of NVIDIA's tools that do it",
    )
    parser.add_argument("--json", action="store_true", help="the engines, or the commands, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Builds each profile in turn."""
    from trimvlm.bundle import Bundle
    from trimvlm_engines import record, targets
    from trimvlm_engines.build import build

    target = targets.load(args.target)
    asked = f"--target {shlex.quote(args.target)}"
    if args.no_empty_tensors:
        asked += " --no-empty-tensors"
        target = msgspec.structs.replace(target, empty_tensors=False)
    opened = (Bundle if args.explain else record.open_bundle)(args.bundle)
    names = [args.profile] if args.profile else sorted(opened.manifest.profiles)
    if args.explain:
        return print_commands(args.bundle, target, names, as_json=args.json)
    engines, kept = {}, {}
    with console.stages() as show:
        for number, name in enumerate(names):
            states = kept.setdefault(name, {})
            tell, watch = watching(show, f"{name} ({number + 1} of {len(names)})", states)
            engines[name] = build(args.bundle, target, name, asked=asked, tell=tell, watch=watch)
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


def watching(
    show: console.Tell, what: str, kept: dict[str, bool]
) -> tuple[Callable[[str, str], None], Callable[[str, Progress], None]]:
    """`tell` and `watch` for `build`: the parts of one profile as stages, a percent a step, their phases as
    notes. `kept` is filled with which parts were up to date."""
    from trimvlm_engines.progress import Share

    shares: dict[str, Share] = {}
    shown: dict[str, tuple[int, str]] = {}

    def tell(role: str, state: str) -> None:
        if state != "building":
            kept[role] = state == "up to date"
        show(f"{what} {role}", 0 if state == "building" else 100, 100, state)

    def watch(role: str, progress: Progress) -> None:
        percent = int(100 * shares.setdefault(role, Share())(progress))
        note = f"{progress.phase} {progress.done}/{progress.total}"
        if shown.get(role) != (percent, progress.phase):
            shown[role] = percent, progress.phase
            show(f"{what} {role}", percent, 100, note)

    return tell, watch


def print_commands(bundle: Path, target: Target, names: Sequence[str], *, as_json: bool) -> int:
    """Prints a shell script, or the words of each command as JSON."""
    from trimvlm_engines.explain import explain, version_explained

    commands = {name: explain(bundle, target, name) for name in names}
    version = version_explained(target)
    if as_json:
        found = [{"profile": name, **each._asdict()} for name in names for each in commands[name]]
        console.emit({"target": target.name, "version": version, "commands": found})
        return 0
    print(f"# {target.name}: {target.backend} {version}; plans go to the current directory, each twice:")
    print("# by the library's own tool, and by Polygraphy. Take one of the two.")
    for name in names:
        for command in commands[name]:
            print(f"\n# {name}, {command.role}, {command.tool}\n{command.text()}")
    return 0


def _whole(number: float | None) -> int | None:
    """The manifest keeps measurements as floats; bytes are shown in full."""
    return None if number is None else int(number)
