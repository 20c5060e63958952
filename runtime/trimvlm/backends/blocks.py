"""A decoder in blocks of layers, each a graph or plan of its own, that runs like a whole one.

Blocks are the roles `decoder.0`, `decoder.1`, ... of a backend. What one makes for a later one is kept where
the backend has it, and let go when its last reader has run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from trimvlm.backends import PRESENT_CACHES, Backend, Port

CARRIED = "carried."  # how names of values begin that are between blocks only

_BLOCK = re.compile(r"decoder\.(\d+)")


def part_of(role: str) -> str:
    """What a role of an engine is a part of: `decoder` for a block, else the role itself."""
    return "decoder" if _BLOCK.fullmatch(role) else role


def block_roles(roles: Iterable[str]) -> list[str]:
    """The roles of blocks among `roles`, in the order in which they run; none for a whole decoder."""
    found = [role for role in roles if _BLOCK.fullmatch(role)]
    return sorted(found, key=lambda role: int(role.partition(".")[2]))


class Blocks:
    """See `Backend`: offers the role `decoder`, made of blocks, and the inner backend's others."""

    def __init__(self, inner: Backend, roles: Sequence[str]) -> None:
        """`roles`: of the blocks, as `block_roles` gives them."""
        self.inner = inner
        self.roles = list(roles)

    def __enter__(self) -> Blocks:
        self.inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.inner.__exit__(kind, error, trace)

    def inputs(self, role: str) -> dict[str, Port]:
        if role != "decoder":
            return self.inner.inputs(role)
        made = {name for block in self.roles for name in self.inner.outputs(block)}
        found = {name: port for block in self.roles for name, port in self.inner.inputs(block).items()}
        return {name: port for name, port in found.items() if name not in made}

    def outputs(self, role: str) -> dict[str, Port]:
        if role != "decoder":
            return self.inner.outputs(role)
        found = {name: port for block in self.roles for name, port in self.inner.outputs(block).items()}
        return {name: port for name, port in found.items() if not name.startswith(CARRIED)}

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        if role != "decoder":
            return self.inner.run(role, feeds, fetch, keep)
        values, wanted, results = dict(feeds), {*fetch, *keep}, {}
        readers = {name: block for block in self.roles for name in self.inner.inputs(block)}
        for block in self.roles:
            made = self.inner.outputs(block)
            carried = [name for name in made if name in readers and name not in fetch]
            ran = self.inner.run(
                block,
                {name: values[name] for name in self.inner.inputs(block)},
                [name for name in made if name in fetch],
                [*carried, *(name for name in made if name in keep and name not in carried)],
            )
            assert PRESENT_CACHES not in ran, f"{block}: caches that grow in place are of whole decoders"
            results |= {name: value for name, value in ran.items() if name in wanted}
            values |= ran
            values = {name: value for name, value in values.items() if readers.get(name) != block}
        return results
