"""Turn another tool's pruning configuration into a profile of a model, or list the profiles that come with
trimvlm (`--list`; `trimvlm export --profile NAME` takes them by name). A key that no decision corresponds to
is an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm import`."""
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="the other tool's configuration")
    parser.add_argument("--format", metavar="NAME", help="what it is: lightcompress or llm-drop")
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint that the profile is for")
    parser.add_argument("-o", "--out", type=Path, metavar="PROFILE", help="profile to write (YAML)")
    parser.add_argument("--list", action="store_true", help="list formats and shipped profiles")
    parser.add_argument("--json", action="store_true", help="the profile, or the list, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Imports one file, or lists."""
    if args.list:
        return _list(args.json)
    for option, name in (("file", "FILE"), ("format", "--format"), ("model", "--model"), ("out", "--out")):
        if getattr(args, option) is None:
            raise UserError(f"{name}: is needed; see trimvlm import --help")
    from trimvlm_calib.files import save_profile
    from trimvlm_calib.imports import import_profile

    if not args.out.parent.is_dir():
        raise UserError(f"--out: there is no directory {args.out.parent}")
    profile = import_profile(args.file, args.format, args.model, args.out.stem)
    save_profile(profile, args.out)
    if args.json:
        console.emit(profile)
    else:
        print(f"{args.out}: profile {profile.name}; trimvlm inspect {args.out} shows what it does")
    return 0


def _list(as_json: bool) -> int:
    from trimvlm_calib import imports, shipped

    formats = {name: format_.SUMMARY for name, format_ in imports.discover().items()}
    profiles: list[dict[str, Any]] = []
    for name in shipped.names():
        profile = shipped.load(name)
        profiles.append(
            {
                "name": name,
                "family": profile.model.family,
                "visual_tokens": profile.model.visual_tokens,
                "needs_adapted_weights": profile.needs_adapted_weights,
                "notes": profile.notes,
            }
        )
    if as_json:
        console.emit({"formats": formats, "profiles": profiles})
        return 0
    width = max(map(len, formats))
    for name, summary in formats.items():
        print(f"{name:<{width}}  {summary}")
    print()
    print(console.table(("profile", "family", "tokens", "what"), [_row(profile) for profile in profiles]))
    return 0


def _row(profile: dict[str, Any]) -> tuple[Any, ...]:
    what = profile["notes"].partition(". ")[0].rstrip(".")
    return profile["name"], profile["family"], profile["visual_tokens"], what
