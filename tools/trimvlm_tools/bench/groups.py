"""Races of more contenders than fit into memory at once: groups that each hold the anchor.

A ratio to the anchor is always taken within a round of one group; contenders of different groups are compared
by their ratios to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from trimvlm.errors import UserError
from trimvlm.value import Value
from trimvlm_tools.bench.harness import Contender, Race, Resident, Spread, race
from trimvlm_tools.bench.machine import available_bytes


class Samples(Value, frozen=True, kw_only=True):
    """All counted runs of one process of a contender: by figure a value per round."""

    process: int
    figures: dict[str, tuple[float, ...]]


class Grouped(Value, frozen=True, kw_only=True):
    """The races of all groups, each as often as there were processes."""

    anchor: str
    races: tuple[Race, ...]

    @property
    def failed(self) -> dict[str, str]:
        """Contenders that failed in some race, with their error."""
        return {name: error for each in self.races for name, error in each.failed.items()}

    @property
    def cpu_seconds(self) -> float:
        """Processor time of all counted runs."""
        return sum(each.cpu_seconds for each in self.races)

    def ran(self, name: str) -> bool:
        """Whether there are figures of it."""
        return bool(self._of(name))

    def samples(self, name: str) -> tuple[Samples, ...]:
        """Of each process of one contender, in order."""
        return tuple(
            Samples(process=number, figures=each.figures[name])
            for number, each in enumerate(self._of(name), 1)
        )

    def figures(self, name: str) -> dict[str, tuple[float, ...]]:
        """By figure its values in all rounds of all processes; empty: it did not run."""
        found: dict[str, tuple[float, ...]] = {}
        for each in self._of(name):
            for figure, values in each.figures[name].items():
                found[figure] = (*found.get(figure, ()), *values)
        return found

    def spread(self, name: str, figure: str = "seconds") -> Spread:
        """Of one figure, over all races that it ran in."""
        return Spread.of(self.figures(name)[figure])

    def ratio(self, name: str, figure: str = "seconds") -> Spread:
        """A figure over the anchor's, round by round of all races."""
        return Spread.of(
            [ratio for each in self._of(name) for ratio in each.ratios(name, self.anchor, figure)]
        )

    def open_seconds(self, name: str) -> float:
        """Median over its processes."""
        return median(each.open_seconds[name] for each in self._of(name))

    def memory(self, name: str) -> Resident | None:
        """Of its first process."""
        return next((each.memory[name] for each in self.races if name in each.memory), None)

    def _of(self, name: str) -> list[Race]:
        return [each for each in self.races if name in each.figures]


def race_in_groups(
    contenders: Sequence[Contender],
    *,
    always: Sequence[Contender],
    needs: Mapping[str, int],
    runs: int,
    processes: int,
    save: Mapping[str, Path],
    advance: Callable[[str], None] = lambda _: None,
) -> Grouped:
    """Times the contenders in as few groups as memory allows.

    Args:
        always: in every group, the first is the anchor.
        needs: bytes of memory that a contender may take, by name.
        runs: counted rounds of each process.
        processes: how often each group is started anew. The same program differs from one process to the
            next, by where its memory lies, and all rounds of one process share that luck. Each time another
            contender starts first: the first was 6 to 12 % slower than its own copies after it.
        save: as for `race`.

    Raises:
        UserError: the anchor failed, nothing can be compared with it.
    """
    anchor = always[0].name
    races: list[Race] = []
    for group in grouped(contenders, always, needs, available_bytes()):
        failed: dict[str, str] = {}
        for number in range(processes):
            again = [each for each in group if each.name not in failed]
            first = number * len(again) // processes
            again = again[first:] + again[:first]
            wanted = {each.name: save[each.name] for each in again if each.name in save}
            found = race(again, runs=runs, save=wanted, advance=advance)
            failed |= found.failed
            if anchor in failed:
                raise UserError(f"{anchor} failed, nothing to compare with: {failed[anchor]}")
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
