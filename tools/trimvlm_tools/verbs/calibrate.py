"""Make a pruning profile: measure a model on samples with one published method, or several that compose
(`--method fastv+v-skip`). `trimvlm methods` lists them. Samples are a folder with questions.jsonl, one
{"image": "a.png", "question": "what is it ?"} a line, or `demo`: drawn here for the demo model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trimvlm.errors import UserError
from trimvlm_tools.console import emit, stages

DEMO = "demo"
DEMO_SAMPLES = 100  # as many are there to draw from


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm calibrate`."""
    parser.add_argument("model", type=Path, help="directory of a Hugging Face checkpoint")
    parser.add_argument("--method", required=True, metavar="NAME")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of samples, or demo")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="profile to write (YAML)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="how many to draw; default: as many as the paper took"
    )
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the method; repeatable; fastv.keep=0.25 where methods compose",
    )
    parser.add_argument("--json", action="store_true", help="the profile as JSON on stdout too")


def run(args: argparse.Namespace) -> int:
    """Calibrates and writes the profile."""
    import yaml

    from trimvlm.profile import check_name
    from trimvlm_calib.calibrate import calibrate
    from trimvlm_calib.files import save_profile
    from trimvlm_calib.samples import load_samples
    from trimvlm_tools.demo_data import demo_samples

    check_name(args.out.stem)  # before the work, not after it
    if not args.out.parent.is_dir():
        raise UserError(f"--out: there is no directory {args.out.parent}")
    parameters: dict[str, Any] = {}
    for setting in args.set:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise UserError(f"--set: {setting!r} is not KEY=VALUE")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set: the value of {setting!r} cannot be read") from None
    with demo_samples(args.data, "calib", max(args.samples or 0, DEMO_SAMPLES)) as folder, stages() as tell:
        profile = calibrate(
            args.model,
            args.method,
            load_samples(folder),
            parameters,
            data_name=args.data if args.data == DEMO else folder.resolve().name,
            count=args.samples,
            seed=args.seed,
            name=args.out.stem,
            progress=tell,
        )
    save_profile(profile, args.out)
    if args.json:
        emit(profile)
    else:
        print(f"{args.out}: profile {profile.name}; trimvlm inspect {args.out} shows what it does")
    return 0
