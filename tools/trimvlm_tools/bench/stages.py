"""Answers of Sessions: what each step takes, for every profile, on one image and one question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trimvlm.bundle import Bundle
from trimvlm.value import Value
from trimvlm_tools.bench.groups import Grouped, race_in_groups
from trimvlm_tools.bench.harness import Contender, Resident, Spread, own_contender

PROMPT = "What is in the picture?"


class Steps(Value, frozen=True, kw_only=True):
    """Seconds of one answer's steps; None: not run, or part of another step.

    Attributes:
        select: selection before the decoder.
        prefill: decoder over the prompt, its own selections included.
        first_token: everything until then, by the clock on the wall.
        first_graph, first_host: of that, inside graphs and outside.
        decode_graph, decode_host: the same of all further tokens.
        tokens_per_second: decode; None where the first token ended the answer.
        decode_tokens: how many tokens were decoded after the first.
        cores: processors kept busy (median).
        open_seconds: time to open the session.
    """

    profile: str
    preprocess: Spread | None
    vision: Spread | None
    select: Spread | None
    prefill: Spread | None
    first_token: Spread
    first_graph: Spread
    first_host: Spread
    decode_graph: Spread | None
    decode_host: Spread | None
    tokens_per_second: float | None
    decode_tokens: int
    cores: float
    open_seconds: float
    memory: Resident | None

    @property
    def first_host_share(self) -> float:
        """Of the time to the first token, outside graphs."""
        return self.first_host.median / self.first_token.median

    @property
    def decode_host_share(self) -> float | None:
        """Of the time of a decoded token, outside graphs."""
        if self.decode_host is None or self.decode_graph is None:
            return None
        return self.decode_host.median / (self.decode_host.median + self.decode_graph.median)


def session_contender(
    name: str,
    bundle: Bundle,
    profile: str,
    work: Path,
    *,
    target: str,
    image: Path,
    prompt: str,
    tokens: int,
    threads: int,
) -> Contender:
    """A Session's process, which gives one answer a run."""
    spec: dict[str, Any] = {
        "bundle": str(bundle.directory.absolute()),
        "profile": profile,
        "target": target,
        "options": {"threads": threads} if target.startswith("ort-cpu") else {},
        "image": str(image.absolute()),
        "prompt": prompt,
        "tokens": tokens,
    }
    return own_contender(name, "session_worker", spec, work / f"{name}.json")


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
    processes: int,
    advance: Callable[[str], None] = lambda _: None,
) -> tuple[list[Steps], Grouped]:
    """Times profiles turn by turn, each in its own process.

    Args:
        image: the user's picture; None: one of noise, 640 x 480.
        tokens: at most so many tokens are generated.

    Raises:
        UserError: the first profile failed.
    """
    work.mkdir(parents=True, exist_ok=True)
    picture = image or noise_image(work / "noise.png", (640, 480))
    contenders = [
        session_contender(
            name,
            bundle,
            name,
            work,
            target=target,
            image=picture,
            prompt=prompt,
            tokens=tokens,
            threads=threads,
        )
        for name in profiles
    ]
    weights = sum(bundle.manifest.files[file].bytes for file in bundle.manifest.weights)
    result = race_in_groups(
        contenders[1:],
        always=contenders[:1],
        needs={each.name: 2 * weights for each in contenders},
        runs=runs,
        processes=processes,
        save={},
        advance=advance,
    )
    return [steps_of(result, name) for name in profiles if name not in result.failed], result


def steps_of(result: Grouped, name: str) -> Steps:
    """Figures of one profile."""
    figures = result.figures(name)

    def spread(figure: str) -> Spread | None:
        return Spread.of(figures[figure]) if figure in figures else None

    count, decode = int(figures["decode_tokens"][-1]), spread("decode_graph")
    host = spread("decode_host")
    return Steps(
        profile=name,
        preprocess=spread("preprocess"),
        vision=spread("vision"),
        select=spread("select"),
        prefill=spread("prefill"),
        first_token=Spread.of(figures["first_token"]),
        first_graph=Spread.of(figures["first_graph"]),
        first_host=Spread.of(figures["first_host"]),
        decode_graph=decode,
        decode_host=host,
        tokens_per_second=count / (decode.median + host.median) if decode and host else None,
        decode_tokens=count,
        cores=float(np.median(np.divide(figures["cpu_seconds"], figures["seconds"]))),
        open_seconds=result.open_seconds(name),
        memory=result.memory(name),
    )


def noise_image(path: Path, size: tuple[int, int]) -> Path:
    """A picture of noise, `size` wide and high, always the same."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return path
