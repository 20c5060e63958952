"""Predict whether a bundle fits a target, before anything is built: memory part by part, and times.

  trimvlm fit BUNDLE --target jetson-orin-nano-8gb --text 512 --new-tokens 256

Nothing is run or built, and no weights are read. Where it does not fit, changes that would make it fit are
predicted in the same way. Times are estimates from the target's peak and bandwidth. Exits with 1 where a
profile does not fit; docs/fit.md says how good the predictions are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trimvlm_tools import console


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `trimvlm fit`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="directory that `trimvlm export` wrote")
    parser.add_argument(
        "--target",
        default="ort-cpu",
        help="name (`trimvlm targets`) or a .yaml of your own; default: ort-cpu",
    )
    parser.add_argument("--profile", help="only this profile or choice; default: all of the bundle's")
    parser.add_argument("--text", type=int, default=512, help="text rows of the prompt (512)")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens of the answer (256)")
    parser.add_argument("--images", type=int, default=1, help="images in the context (1)")
    parser.add_argument("--json", action="store_true", help="the predictions as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints one report per profile; 1 if one does not fit."""
    from trimvlm.bundle import Bundle
    from trimvlm_engines import targets
    from trimvlm_engines.fit.changes import changes
    from trimvlm_engines.fit.prediction import predict
    from trimvlm_engines.fit.sizes import Request
    from trimvlm_tools.fit.text import prediction_text

    target = targets.load(args.target)
    request = Request(images=args.images, text=args.text, new_tokens=args.new_tokens)
    bundle = Bundle(args.bundle)
    named = bundle.named(args.profile) if args.profile else sorted(bundle.manifest.profiles)
    names = [member for name in named for member in bundle.members(name)]
    found = [predict(bundle, name, target, request) for name in names]
    better = {each.profile: changes(bundle, each.profile, target, request) for each in found if each.problems}
    if args.json:
        console.emit([_plain(each, better.get(each.profile, ())) for each in found])
    else:
        print("\n\n".join(prediction_text(each, target, better.get(each.profile, ())) for each in found))
    return 1 if any(each.problems for each in found) else 0


def _plain(found, changes) -> dict:
    """A prediction with what follows from it."""
    import msgspec

    plain = msgspec.to_builtins(found)
    plain["memory"] |= {"peak": found.memory.peak, "least": found.memory.least}
    plain |= {"fits": found.fits, "takes_turns": found.takes_turns, "left": found.left, "changes": changes}
    if found.times is not None:
        plain["times"] |= {
            "first_token": found.times.first_token,
            "tokens_per_second": found.times.tokens_per_second,
            "basis": "estimated from the target's peak and bandwidth, never measured",
        }
    return plain
