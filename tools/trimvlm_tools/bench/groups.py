"""Races of more contenders than fit into memory at once: groups that each hold the anchor.

A ratio to the anchor is always taken within a round of one group; contenders of different groups are compared
by their ratios to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_tools.bench.harness import Contender, Race, Resident, Spread, race
from trimvlm_tools.bench.machine import available_bytes


class Grouped(Value, frozen=True, kw_only=True):
    """The races of all groups."""

    anchor: str
    races: tuple[Race, ...]

    @property
    def failed(self) -> dict[str, str]:
        """Contenders that failed in some group, with their error."""
        return {name: error for each in self.races for name, error in each.failed.items()}

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all counted runs."""
        return sum(each.cpu_seconds for each in self.races)

    def ran(self, name: str) -> bool:
        """Whether there are figures of it."""
        return any(name in each.figures for each in self.races)

    def figures(self, name: str) -> dict[str, tuple[float, ...]]:
        """By figure its values in all rounds of all groups; empty: it did not run."""
        found: dict[str, tuple[float, ...]] = {}
        for each in self.races:
            for figure, values in each.figures.get(name, {}).items():
                found[figure] = (*found.get(figure, ()), *values)
        return found

    def spread(self, name: str, figure: str = "seconds") -> Spread:
        """Of one figure, over all groups that it ran in."""
        return Spread.of(self.figures(name)[figure])

    def ratio(self, name: str, figure: str = "seconds") -> Spread:
        """A figure over the anchor's, round by round."""
        within = next(each for each in self.races if name in each.figures)
        return within.ratio(name, self.anchor, figure)

    def open_seconds(self, name: str) -> float:
        """Of its first process."""
        return next(each.open_seconds[name] for each in self.races if name in each.open_seconds)

    def memory(self, name: str) -> Resident | None:
        """Of its first process."""
        return next((each.memory[name] for each in self.races if name in each.memory), None)


def race_in_groups(
    contenders: Sequence[Contender],
    *,
    always: Sequence[Contender],
    needs: Mapping[str, int],
    runs: int,
    save: Mapping[str, Path],
    advance: Callable[[str], None] = lambda _: None,
) -> Grouped:
    """Times the contenders in as few groups as memory allows.

    Args:
        always: in every group, the first is the anchor.
        needs: bytes of memory that a contender may take, by name.
        save: as for `race`.

    Raises:
        UserError: the anchor failed, nothing can be compared with it.
    """
    anchor = always[0].name
    races = []
    for group in grouped(contenders, always, needs, available_bytes()):
        found = race(
            group, runs=runs, save={c.name: save[c.name] for c in group if c.name in save}, advance=advance
        )
        if anchor in found.failed:
            raise UserError(f"{anchor} failed, nothing to compare with: {found.failed[anchor]}")
        races.append(found)
    return Grouped(anchor=anchor, races=tuple(races))


def grouped(
    contenders: Sequence[Contender],
    always: Sequence[Contender],
    needs: Mapping[str, int],
    available: int | None,
) -> list[list[Contender]]:
    """Groups in order, each with all of `always`; what fits nowhere gets a group of its own all the same."""
    fixed = sum(needs.get(each.name, 0) for each in always)
    groups: list[list[Contender]] = [[*always]]
    held = fixed
    for each in contenders:
        wanted = needs.get(each.name, 0)
        if available is not None and held + wanted > available and len(groups[-1]) > len(always):
            groups.append([*always])
            held = fixed
        groups[-1].append(each)
        held += wanted
    return groups
