"""A backend that passes everything on to another, for those who look at what passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from trimvlm.backends import Backend, Port

_Same = TypeVar("_Same", bound="Forwarding")


class Forwarding:
    """See `Backend`.

    Attributes:
        backend: the other.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __enter__(self: _Same) -> _Same:
        self.backend.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.backend.__exit__(kind, error, trace)

    def inputs(self, role: str) -> dict[str, Port]:
        return self.backend.inputs(role)

    def outputs(self, role: str) -> dict[str, Port]:
        return self.backend.outputs(role)

    def run(
        self, role: str, feeds: Mapping[str, Any], fetch: Sequence[str], keep: Sequence[str] = ()
    ) -> dict[str, Any]:
        return self.backend.run(role, feeds, fetch, keep)
