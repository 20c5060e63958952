"""Show what a model, a bundle or a profile holds and costs. Nothing is run, and no weights are loaded.

  trimvlm inspect MODEL      family, geometry, weights, graphs, costs, and everything that export would refuse
  trimvlm inspect BUNDLE     its profiles' schedules, budgets, costs and graphs; its files and engines
  trimvlm inspect PROFILE    a profile alone (YAML)

MODEL is a Hugging Face checkpoint's directory, or its Hub id where it is in the local cache. Exits with 1
where export would refuse the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm_tools import console
from trimvlm_tools.arguments import MODEL, add_image_size

if TYPE_CHECKING:
    from trimvlm.profile import Profile


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm inspect`."""
    parser.add_argument("path", metavar="MODEL_OR_BUNDLE", help="a model, a bundle or a profile (YAML)")
    parser.add_argument("--profile", help="one profile of a bundle; all of them when left out")
    parser.add_argument("--model", help=f"also check that the profile fits {MODEL}")
    parser.add_argument("--text", type=int, default=32, help="text rows t that costs are counted with (32)")
    add_image_size(parser)
    parser.add_argument("--json", action="store_true", help="machine-readable report on stdout")


def run(args: argparse.Namespace) -> int:
    """Reports on whatever lies there."""
    from trimvlm.bundle import MANIFEST
    from trimvlm_export.hub import is_hub_id

    if args.text < 1:
        raise UserError(f"--text: {args.text} is not a positive number of rows")
    path = Path(args.path)
    if is_hub_id(args.path) or (path.is_dir() and not (path / MANIFEST).is_file()):
        for option in ("profile", "model"):
            if getattr(args, option):
                raise UserError(f"--{option}: {args.path} is a model, not a bundle or a profile")
        return _model(args)
    if args.image_size:
        raise UserError("--image-size: is for a model; a profile says itself for which grid of images it is")
    report, text = _bundle(path, args) if path.is_dir() else _profile(path, args)
    if args.json:
        console.emit(report)
    else:
        print(text)
    return 0


def _model(args: argparse.Namespace) -> int:
    from trimvlm_export.hub import resolve_checkpoint
    from trimvlm_tools.inspection.checkpoint import describe_checkpoint
    from trimvlm_tools.inspection.checkpoint_text import checkpoint_text

    report = describe_checkpoint(args.path, resolve_checkpoint(args.path), args.image_size, args.text)
    if args.json:
        console.emit({"model": report})
    else:
        print(checkpoint_text(report))
    return 0 if report["exportable"] else 1


def _bundle(path: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from trimvlm.bundle import Bundle
    from trimvlm_tools.inspection.bundle import bundle_text, describe_bundle, describe_graphs, graphs_text
    from trimvlm_tools.inspection.profile import describe, profile_text

    bundle = Bundle(path)
    names = [bundle.entry(args.profile)[0]] if args.profile else sorted(bundle.manifest.profiles)
    profiles = [bundle.profile(name) for name in names]
    _check(profiles, args.model)
    described = [
        {**describe(profile, args.text, bundle.manifest.dtype), "graphs": describe_graphs(bundle, name)}
        for name, profile in zip(names, profiles, strict=True)
    ]
    report = {"profiles": described, "bundle": describe_bundle(bundle)}
    parts = [part for each in described for part in (profile_text(each), graphs_text(each["graphs"]))]
    return report, "\n\n".join([*parts, bundle_text(report["bundle"])])


def _profile(path: Path, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from trimvlm_calib import files
    from trimvlm_tools.inspection.profile import describe, profile_text

    if args.profile:
        raise UserError(f"--profile: {path} is a single profile, not a bundle")
    profile = files.load_profile(path)
    _check([profile], args.model)
    described = describe(profile, args.text, "float16")
    return {"profiles": [described]}, profile_text(described)


def _check(profiles: list[Profile], model: str | None) -> None:
    """Refuses profiles that are not for this model."""
    if model is None:
        return
    from trimvlm.profile import check_fits
    from trimvlm_export.checkpoint import model_spec
    from trimvlm_export.hub import resolve_checkpoint

    checkpoint = resolve_checkpoint(model)
    for profile in profiles:
        check_fits(profile, model_spec(checkpoint, profile.model.grid))
