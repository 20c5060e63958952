"""Write a checkpoint as a bundle: ONNX graphs for each profile beside one copy of the weights. A bundle of
the same checkpoint that is already there gets the profiles added. Without --profile: the dense model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm_tools import console
from trimvlm_tools.arguments import MODEL, add_image_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm export`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="FILE",
        help="profile (YAML), or the name of a shipped one (trimvlm import --list); repeatable",
    )
    add_image_size(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="directory to write")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument(
        "--no-empty-tensors",
        action="store_true",
        help="also decoders without empty tensors, for `trimvlm build --no-empty-tensors`",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Exports one profile after the other; all of them are checked before the first is written."""
    from trimvlm.bundle import Bundle
    from trimvlm.profile import Method, Profile
    from trimvlm.schedule import Schedule
    from trimvlm_calib import shipped
    from trimvlm_export.checkpoint import model_spec
    from trimvlm_export.export import existing_bundle, export
    from trimvlm_export.hub import resolve_checkpoint
    from trimvlm_export.loading import grid_of

    model = resolve_checkpoint(args.model)
    existing_bundle(args.out)  # before anything is hashed that it knows
    if args.profile:
        if args.image_size:
            raise UserError(
                "--image-size: a profile says itself for which grid of images it is; leave it out"
            )
        profiles = [shipped.load_file_or_shipped(each) for each in args.profile]
    else:
        spec = model_spec(model, grid_of(model, args.image_size))
        profiles = [Profile(name="dense", method=Method(name="dense"), model=spec)]
    for number, profile in enumerate(profiles):
        Schedule.resolve(profile, model_spec(model, profile.model.grid))
        if profile.key in {other.key for other in profiles[:number]}:
            raise UserError(f"--profile: two profiles are named {profile.key}; rename one")
    beside = [Path(each).parent for each in args.profile] or [None]
    with console.progress("export", len(profiles)) as step:
        for profile, directory in zip(profiles, beside, strict=True):
            export(
                model,
                profile,
                args.out,
                dtype=args.dtype,
                beside=directory,
                filled=args.no_empty_tensors,
            )
            step(profile.key)
    manifest = Bundle(args.out).manifest
    size = sum(file.bytes for file in manifest.files.values())
    names = [profile.key for profile in profiles]
    if args.json:
        console.emit({"bundle": str(args.out), "bytes": size, "written": names, "dtype": args.dtype})
    else:
        print(f"{args.out}: wrote {', '.join(names)} in {args.dtype}")
        print(f"{args.out}: {len(manifest.profiles)} profiles, {size:,} bytes")
    return 0
