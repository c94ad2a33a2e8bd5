"""The workers of a run, as one of them sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _nobody_asks(_doing: str) -> None:
    pass


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    mark: Callable[[str], None] = _nobody_asks
    """Told at each step forward, of whatever size, with what comes next: who tells nothing for long hangs."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all workers, in float64."""
        if self.size == 1:
            self.mark("a step")
            return list(values)
        self.mark("a step, where workers wait for each other")
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed)
        summed = packed.tolist()
        self.mark("a step")
        return summed

    def barrier(self) -> None:
        if self.size > 1:
            self.sum(0.0)

    def gather(self, value: Any) -> list[Any]:
        """Each worker's value, a small one of plain Python, on every worker."""
        gathered = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, value)
        return gathered

    def from_first(self, values: Tensor) -> Tensor:
        """Rank 0's tensor, on every worker."""
        if self.size > 1:
            dist.broadcast(values, src=0)
        return values
