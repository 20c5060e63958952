"""Processes that train together on one machine, through shared memory.

One process of one thread per core, meeting four times a step, instead of one process of several threads,
meeting thousands of times: where other programs use the same cores, threads that wait for each other in
every operation were measured ten times slower.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import BrokenBarrierError
from typing import Protocol

import torch
from torch import Tensor


class Barrier(Protocol):
    """What is used of `multiprocessing.Barrier`."""

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass
class Team:
    """One process's view of the team.

    `gradients`: shared float32 [size, parameters]; `updates`: [parameters]; `value`: [1]. Unused when alone.
    """

    rank: int = 0
    size: int = 1
    barrier: Barrier | None = None
    gradients: Tensor = field(default_factory=lambda: torch.empty(1, 0))
    updates: Tensor = field(default_factory=lambda: torch.empty(0))
    value: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def wait(self) -> None:
        """Return when every process has called this; a process that died is an error here."""
        if self.barrier is not None:
            try:
                self.barrier.wait(timeout=600.0)
            except BrokenBarrierError:
                raise RuntimeError("another training process ended; resume from the last state") from None

    def agree(self, seconds: float) -> float:
        """The first process's value, in every process."""
        if self.size == 1:
            return seconds
        if self.rank == 0:
            self.value[0] = seconds
        self.wait()
        agreed = float(self.value[0])
        self.wait()
        return agreed

    def board(self, start: int, length: int) -> Tensor:
        """A flat piece of the shared updates, or a fresh one when alone."""
        return self.updates[start : start + length] if self.size > 1 else torch.empty(length)

    def average(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the team."""
        if self.size == 1:
            return
        graded = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sizes = [gradient.numel() for gradient in graded]
        count = sum(sizes)
        torch.cat([gradient.flatten() for gradient in graded], out=self.gradients[self.rank, :count])
        self.wait()
        mean = self.gradients[:, :count].mean(0)
        self.wait()
        for gradient, piece in zip(graded, mean.split(sizes), strict=True):
            gradient.copy_(piece.view_as(gradient))


ALONE = Team()
