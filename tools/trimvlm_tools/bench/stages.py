"""A bundle at work: what each step of an answer takes, for every profile, on one image and one question."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from trimvlm.bundle import Bundle
from trimvlm.value import Value
from trimvlm_tools.bench.harness import Contender, Race, Spread, race

PROMPT = "What is in the picture?"


class Steps(Value, frozen=True, kw_only=True):
    """Seconds of one answer's steps; None: not run, or part of another step.

    Attributes:
        select: selection before the decoder.
        prefill: decoder over the prompt, its own selections included.
        first_token: preprocess + vision + select + prefill.
        tokens_per_second: decode; None where the first token ended the answer.
        decode_tokens: how many tokens were decoded after the first.
        open_seconds: time to open the session.
    """

    profile: str
    preprocess: Spread | None
    vision: Spread | None
    select: Spread | None
    prefill: Spread | None
    first_token: Spread
    tokens_per_second: Spread | None
    decode_tokens: int
    open_seconds: float


def time_steps(
    bundle: Bundle,
    profiles: Sequence[str],
    target: str,
    work: Path,
    *,
    image: Path | None,
    prompt: str,
    tokens: int,
    threads: int,
    runs: int,
    advance: Callable[[str], None] = lambda _: None,
) -> tuple[list[Steps], Race]:
    """Times profiles turn by turn, each in its own process.

    Args:
        image: the user's picture; None: one of noise, 640 x 480.
        tokens: at most so many tokens are generated.
    """
    work.mkdir(parents=True, exist_ok=True)
    contenders = []
    for index, profile in enumerate(profiles):
        spec = {
            "bundle": str(bundle.directory),
            "profile": profile,
            "target": target,
            "options": {"threads": threads} if target == "ort-cpu" else {},
            "image": str(image or noise_image(work / "noise.png")),
            "prompt": prompt,
            "tokens": tokens,
        }
        path = work / f"{index}.json"
        path.write_text(json.dumps(spec))
        command = (sys.executable, "-m", "trimvlm_tools.bench.session_worker", str(path))
        contenders.append(Contender(name=profile, command=command))
    result = race(contenders, runs=runs, advance=advance)
    return [steps_of(result, profile) for profile in profiles if profile not in result.failed], result


def steps_of(result: Race, profile: str) -> Steps:
    """Figures of one profile."""

    def spread(figure: str) -> Spread | None:
        return result.spread(profile, figure) if figure in result.figures[profile] else None

    return Steps(
        profile=profile,
        preprocess=spread("preprocess"),
        vision=spread("vision"),
        select=spread("select"),
        prefill=spread("prefill"),
        first_token=result.spread(profile, "first_token"),
        tokens_per_second=spread("tokens_per_second"),
        decode_tokens=int(result.figures[profile]["decode_tokens"][-1]),
        open_seconds=result.open_seconds[profile],
    )


def noise_image(path: Path) -> Path:
    """A picture of noise, always the same."""
    if not path.is_file():
        pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return path
