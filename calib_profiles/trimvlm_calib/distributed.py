"""Calibration by several processes: torchrun (or accelerate launch) starts them, the samples are dealt out.

Every process does the same work on its own samples and gets everybody's figures, so every one of them comes
to the same decisions; the first one writes. Figures travel through gloo, on the processor, also where the
models run on GPUs.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

from trimvlm.value import Value

PATIENCE = datetime.timedelta(days=7)  # for a process whose samples were all measured before a kill
K = TypeVar("K")
V = TypeVar("V")


class Team(Value, frozen=True, kw_only=True):
    """The processes of this calibration.

    Attributes:
        rank: this one's number; the first, 0, speaks and writes.
        size: how many there are.
        device: number of this process's GPU, where there are any.
    """

    rank: int = 0
    size: int = 1
    device: int = 0

    def mine(self, count: int) -> range:
        """Which of `count` samples this process measures."""
        return range(self.rank, count, self.size)

    def gather(self, mine: Mapping[K, V]) -> dict[K, V]:
        """Everybody's entries; all processes must come here."""
        if self.size == 1:
            return dict(mine)
        import torch.distributed

        parts: list[Mapping[K, V]] = [{}] * self.size
        torch.distributed.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}


ALONE = Team()


@contextlib.contextmanager
def join() -> Iterator[Team]:
    """The team that the launcher's environment variables (WORLD_SIZE, RANK, ...) describe, or `ALONE`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Team(
            rank=torch.distributed.get_rank(),
            size=torch.distributed.get_world_size(),
            device=int(os.environ.get("LOCAL_RANK", "0")),
        )
    finally:
        torch.distributed.destroy_process_group()
