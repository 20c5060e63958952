"""Make a pruning profile: measure a model on samples with one published method, or several that compose
(`--method fastv+v-skip`). `trimvlm methods` lists them. Samples are a folder with questions.jsonl or a JSONL
file, one {"image": "a.png", "question": "what is it ?"} a line, or `demo`: drawn here for the demo model.

A run that was killed goes on where it stopped: start it again. Several processes share the samples:
  torchrun --nproc-per-node 2 -m trimvlm_tools calibrate MODEL ...
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimvlm.errors import UserError
from trimvlm_tools.arguments import MODEL, add_image_size
from trimvlm_tools.console import emit, say, stages

if TYPE_CHECKING:
    from trimvlm.profile import Profile
    from trimvlm_calib.distributed import Team

DEMO = "demo"
DEMO_SAMPLES = 100  # as many are there to draw from


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm calibrate`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--method", required=True, metavar="NAME")
    parser.add_argument("--data", required=True, metavar="PATH", help="folder or JSONL of samples, or demo")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="profile to write (YAML)"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="how many to draw; default: as many as the paper took"
    )
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (0)")
    add_image_size(parser)
    parser.add_argument("--task", metavar="NAME", help="draw only samples whose `task` is this")
    parser.add_argument(
        "--curves", type=Path, metavar="FILE", help="draw them here (.svg, .png); default: beside the profile"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method; repeatable; fastv.keep=0.25 where methods compose",
    )
    parser.add_argument("--json", action="store_true", help="the profile as JSON on stdout too")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the profile and draws its curves."""
    from trimvlm.profile import check_name
    from trimvlm_calib.calibrate import calibrate_all
    from trimvlm_calib.calibrated import save_calibrated
    from trimvlm_calib.curves import check_drawing
    from trimvlm_calib.distributed import join
    from trimvlm_calib.methods import find
    from trimvlm_calib.partial import discard
    from trimvlm_calib.samples import load_samples, set_name
    from trimvlm_export.hub import resolve_checkpoint
    from trimvlm_export.loading import grid_of
    from trimvlm_tools.demo_data import demo_samples

    check_name(args.out.stem)  # before the work, not after it
    find(args.method)
    if not args.out.parent.is_dir():
        raise UserError(f"--out: there is no directory {args.out.parent}")
    if args.curves:
        check_drawing(args.curves)
    parameters, model = _parameters(args.set), resolve_checkpoint(args.model)
    pool = max(args.samples or 0, DEMO_SAMPLES) * (10 if args.task else 1)  # the demo has ten kinds
    with join() as team, demo_samples(args.data, "calib", pool) as data, _progress(team) as tell:
        made = calibrate_all(
            model,
            args.method,
            load_samples(data),
            parameters,
            data_name=args.data if args.data == DEMO else set_name(data),
            count=args.samples,
            seed=args.seed,
            task=args.task,
            name=args.out.stem,
            grid=grid_of(model, args.image_size),
            progress=tell,
            output=args.out,
            team=team,
        )
    if team.rank:
        return 0
    files = save_calibrated(made, args.out)
    discard(args.out)
    drawn = _draw(made.profiles[0], args)
    if args.json:
        emit(made.profiles[0] if len(files) == 1 else made.profiles)
    else:
        for profile, file in zip(made.profiles, files, strict=True):
            print(f"{file}: profile {profile.name}; trimvlm inspect {file} shows what it does")
        if drawn:
            print(f"{drawn}: its curves")
    return 0


def _progress(team: Team) -> contextlib.AbstractContextManager[Any]:
    """What the first of several processes shows stands for all: each has as many samples."""
    return stages() if team.rank == 0 else contextlib.nullcontext()


def _parameters(settings: Sequence[str]) -> dict[str, Any]:
    """`--set` as names and values."""
    import yaml

    parameters: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise UserError(f"--set: {setting!r} is not KEY=VALUE")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set: the value of {setting!r} cannot be read") from None
    return parameters


def _draw(profile: Profile, args: argparse.Namespace) -> Path | None:
    """Where the curves were drawn to. Beside the profile they are extra, and matplotlib may be missing."""
    from trimvlm_calib.curves import draw_curves

    path = args.curves or args.out.with_suffix(".svg")
    try:
        return path if draw_curves(profile, path) else None
    except ModuleNotFoundError as error:
        say(f"{path} is not drawn: {error.name} is not installed; pip install 'trimvlm[tools]'")
        return None
