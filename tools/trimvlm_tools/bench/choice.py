"""Profiles held as a session of their choice holds them: one vision graph, and every decoder with its weights
left in the mapped files. A process that `session_memory` looks at.

Such a bundle needs a router, which random weights have none of. So each member is asked in its turn.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from trimvlm.backends import Backend, Port
from trimvlm.backends.blocks import part_of
from trimvlm.bundle import Bundle
from trimvlm.opening import check_opening, open_backends
from trimvlm.router_spec import Choice
from trimvlm.runner import Runner
from trimvlm.session import Session
from trimvlm.text import load_tokenizer
from trimvlm_tools.forwarding import Forwarding

_NAME = "members"


class Member(Forwarding):
    """A member's decoder behind the vision graph of the first."""

    def __init__(self, own: Backend, first: Backend) -> None:
        super().__init__(own)
        self.first = first

    def inputs(self, role: str) -> dict[str, Port]:
        return self._of(role).inputs(role)

    def outputs(self, role: str) -> dict[str, Port]:
        return self._of(role).outputs(role)

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        return self._of(role).run(role, feeds, fetch, keep)

    def _of(self, role: str) -> Backend:
        return self.backend if part_of(role) == "decoder" else self.first


def members(bundle: Bundle, names: Sequence[str], target: str, threads: int) -> list[Session]:
    """A session of each profile, all on what a session of their choice would hold; the first is to be opened
    first and closed last.

    Raises:
        UserError: as `Session.open`, or the profiles differ in their encoder stage.
    """
    choices = {_NAME: Choice(router="", members=dict.fromkeys(names, ()))}
    bundle.manifest = msgspec.structs.replace(bundle.manifest, choices=choices)
    check_opening(bundle, [_NAME], target)
    tokenizer = load_tokenizer(bundle.path(bundle.manifest.text.tokenizer))
    backends = open_backends(bundle, _NAME, target, {"threads": threads})
    first = backends[names[0]]
    return [
        Session(
            bundle, name, target, [Runner(bundle, name, {name: Member(own, first)}, tokenizer)], tokenizer
        )
        for name, own in backends.items()
    ]


def main() -> None:
    """Says when the members are open, and when each has answered; waits for a line after each."""
    directory, target, question, threads, *names = sys.argv[1:]
    pixels = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    with ExitStack() as held:
        sessions = [
            held.enter_context(each) for each in members(Bundle(directory), names, target, int(threads))
        ]
        print("open", flush=True)
        input()
        for session in sessions:
            for _ in session.generate(question, [Image.fromarray(pixels)], max_new_tokens=8):
                pass
        print("used", flush=True)
        input()


if __name__ == "__main__":
    main()
