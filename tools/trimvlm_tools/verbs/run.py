"""Ask a bundle about images; the answer streams to stdout.

trimvlm run BUNDLE --image photo.jpg --prompt "What is in the picture?"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trimvlm_tools import console
from trimvlm_tools.arguments import target_name


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `trimvlm run`."""
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="repeatable, in this order"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="PROMPT is the whole text as the model sees it, image tokens included",
    )
    parser.add_argument("--profile", help="which profile of the bundle; needed where it holds several")
    parser.add_argument("--target", type=target_name, default="ort-cpu", help="what to run on (ort-cpu)")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="(1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("--json", action="store_true", help="answer and timings as JSON, not streamed")


def run(args: argparse.Namespace) -> int:
    """Generates one answer."""
    from trimvlm import Session

    with Session.open(args.bundle, profile=args.profile, target=args.target) as session:
        pieces = session.generate(
            args.prompt,
            args.image,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            raw=args.raw,
        )
        if args.json:
            answer = "".join(pieces)
        else:
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)
    timings = session.timings
    if args.json:
        report: dict[str, Any] = {
            "answer": answer,
            "profile": session.profile,
            "target": session.target,
            "timings": timings,
            "first_token": timings.first_token,
            "tokens_per_second": timings.tokens_per_second,
        }
        console.emit(report)
    else:
        speed = timings.tokens_per_second
        console.say(
            f"{session.profile} on {session.target}: first token after {timings.first_token:.3f} s"
            + (f", then {speed:.1f} tokens/s" if speed else "")
        )
    return 0
