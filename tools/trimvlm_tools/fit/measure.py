"""Predictions beside what was measured: `python -m trimvlm_tools.fit.measure BUNDLE`.

On ONNX Runtime's CPU provider: the most memory that a process has resident at once (VmHWM of Linux: private
pages and pages of mapped files that it touched), after two answers in a row. Pages of shared libraries are
left out on both sides: how many there are is the kernel's choice. For targets with plans: the sizes of the
plans that `trimvlm build` left in the bundle. Exits with 1 where a prediction is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from trimvlm.bundle import Bundle
from trimvlm.errors import UserError
from trimvlm.text import load_tokenizer, make_prompter
from trimvlm.value import Value
from trimvlm_engines import targets
from trimvlm_engines.fit.on_cpu import LIBRARIES
from trimvlm_engines.fit.prediction import CPU, predict
from trimvlm_engines.fit.sizes import Request
from trimvlm_tools import console
from trimvlm_tools.bench.session_memory import phases

TOLERANCE = 0.1

_ANSWERS = """
import sys
import numpy as np
from PIL import Image
from trimvlm.session import Session

bundle, profile, target, prompt, tokens = sys.argv[1:]
pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
with Session.open(bundle, profile, target, threads=1) as session:
    for _ in range(2):
        for _ in session.generate(prompt, [Image.fromarray(pixels)], max_new_tokens=int(tokens)):
            pass
        if session.timings.decode_tokens < int(tokens) - 1:
            sys.exit("the model ends its answer early; ask for fewer tokens")
    print("used", flush=True)
    input()
"""


class Comparison(Value, frozen=True, kw_only=True):
    """One prediction and its measurement, in bytes."""

    profile: str
    what: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured

    @property
    def good(self) -> bool:
        """Off by no more than 10 %."""
        return abs(self.ratio - 1) <= TOLERANCE


def memory(bundle: Bundle, profile: str, request: Request, target: str = "ort-cpu") -> Comparison:
    """Peak memory of a process that answers, without shared libraries; the prompt has as many text rows as
    can be made, at most `request.text`.

    Raises:
        UserError: see `phases`, the model ends its answer early, or no engine was built for the target.
    """
    prompt, rows = make_prompt(bundle, profile, request.text)
    asked = Request(images=1, text=rows, new_tokens=request.new_tokens)
    found = predict(bundle, profile, targets.load(target), asked, times=False)
    engine = targets.load(target).name
    (used,) = phases(_ANSWERS, str(bundle.directory), profile, engine, prompt, str(request.new_tokens))
    return Comparison(
        profile=profile,
        what=f"memory, {rows} text rows, {request.new_tokens} new tokens",
        predicted=found.memory.peak - LIBRARIES,
        measured=used.memory.peak - used.memory.libraries,
    )


def make_prompt(bundle: Bundle, profile: str, text: int) -> tuple[str, int]:
    """A prompt for one image of at most `text` text rows, and how many it has.

    Raises:
        UserError: one word makes more.
    """
    manifest, stage = bundle.manifest, bundle.profile(profile).decisions.encoder
    visual = stage.keep if stage else bundle.profile(profile).model.visual_tokens
    prompter = make_prompter(load_tokenizer(bundle.path(manifest.text.tokenizer)), manifest.text, visual)

    def words(count: int) -> str:  # different ones, so that different rows of the table are looked up
        return " ".join(f"w{7 + 37 * number % 4000}" for number in range(count))

    def rows(count: int) -> int:
        return len(prompter(words(count), 1).input_ids)

    if rows(1) > text:
        raise UserError(f"--text: a prompt of one word has {rows(1)} rows, more than {text}")
    fewest, most = 1, text
    while fewest < most:
        middle = (fewest + most + 1) // 2
        fewest, most = (middle, most) if rows(middle) <= text else (fewest, middle - 1)
    return words(fewest), rows(fewest)


def plans(bundle: Bundle, profile: str, target: str) -> list[Comparison]:
    """Sizes of the plans that were built for a target, against what is predicted from the graphs alone.

    Raises:
        UserError: none were built.
    """
    loaded = targets.load(target)
    engine = bundle.manifest.profiles[profile].engines.get(loaded.name)
    if engine is None:
        raise UserError(
            f"{bundle.directory}: no engine of {profile} for {loaded.name}; make one with trimvlm build"
        )
    found = predict(bundle, profile, loaded, Request(), times=False)
    engines = [piece for piece in found.memory.pieces if piece.name.endswith(" engine")]
    return [
        Comparison(
            profile=profile,
            what=piece.name,
            predicted=piece.bytes,
            measured=int(engine.measured[f"{piece.name.removesuffix(' engine')}_bytes"]),
        )
        for piece in engines
    ]


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if one is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--profiles", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--text", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)
    bundle, found = Bundle(args.bundle), list[Comparison]()
    for name in args.profiles or sorted(bundle.manifest.profiles):
        profile, _ = bundle.entry(name)
        if targets.load(args.target).provider == CPU:
            asked = [Request(text=text, new_tokens=args.new_tokens) for text in args.text]
            found += [memory(bundle, profile, each, args.target) for each in asked]
        else:
            found += plans(bundle, profile, args.target)
    print(
        console.table(("profile", "what", "predicted MB", "measured MB", "ratio"), [_row(c) for c in found])
    )
    return 0 if all(each.good for each in found) else 1


def _row(found: Comparison) -> tuple[Any, ...]:
    megabytes = [f"{size / 1e6:,.1f}" for size in (found.predicted, found.measured)]
    return found.profile, found.what, *megabytes, f"{found.ratio:.3f}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
