"""Write a checkpoint with random weights at a published model's size, to try export, build and bench on.

  trimvlm synthesize                                   the models that come with trimvlm
  trimvlm synthesize llava-1.5-7b -o build/llava-7b    14 GB in float16, in the shards of the published one
  trimvlm synthesize my.yaml -o build/mine             a geometry of your own

Nothing is downloaded. Answers are nonsense; shapes, names, files and token ids are the published model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model's name, or a YAML file")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="directory to make")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: as published)")
    parser.add_argument(
        "--names",
        choices=("saved", "published"),
        default="saved",
        help="tensor names as transformers 5 saves them, or as in the published files (default: saved)",
    )
    parser.add_argument(
        "--shard-gb", type=float, metavar="GB", help="largest weight file (default: as published)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint, or lists what there is."""
    from trimvlm_tools.random_checkpoint import description

    if args.model is None:
        if args.out:
            raise UserError("--out: which MODEL? trimvlm synthesize lists them")
        return _list(description.shipped(), args.json)
    if args.out is None:
        raise UserError(f"give the directory to make: trimvlm synthesize {args.model} -o DIR")
    if args.seed < 0:
        raise UserError(f"--seed: {args.seed} is not a seed; give 0 or more")
    if args.shard_gb is not None and args.shard_gb <= 0:
        raise UserError(f"--shard-gb: {args.shard_gb} is not a size; give 10^9 bytes, for example 5")
    model = description.load(args.model)
    from trimvlm_tools.random_checkpoint.make import make_checkpoint

    made = make_checkpoint(
        model, args.out, dtype=args.dtype, names=args.names, shard_gb=args.shard_gb, seed=args.seed
    )
    if args.json:
        console.emit(made)
    else:
        print(
            f"{made.directory}: {made.parameters / 1e9:.3f} B parameters in {made.dtype}, {made.tensors} "
            f"tensors, {made.bytes / 1e9:.2f} GB in {made.files} file{'s'[: made.files != 1]}, "
            f"{made.seconds:.0f} s"
        )
    return 0


def _list(models: list, as_json: bool) -> int:
    if as_json:
        console.emit(models)
    else:
        rows = [(model.name, model.config["model_type"], model.dtype, model.source) for model in models]
        print(console.table(("model", "family", "published in", "values from"), rows))
    return 0
