"""The base of every value in trimvlm: frozen, validated at construction, unknown keys refused."""

from __future__ import annotations

import msgspec


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every value here: frozen, unknown keys refused. A class says `frozen` and `kw_only` again:
    msgspec does not inherit the second, type checkers not the first."""
