"""The micro-batches of each step for one worker, made ready while the step before runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from ftray.data.order import Order, assign, step_range
from ftray.data.prepared import Rows
from ftray.model.threads import use_one
from ftray.train.batch import Batch, collate
from ftray.train.world import World


@dataclass(frozen=True)
class StepRows:
    """One step as one worker sees it."""

    cursor: tuple[int, int]
    """Rows consumed before and after the step, over all workers."""
    micro_batches: list[Batch]
    row_ids: list[np.ndarray]
    """Row ids of each micro-batch."""
    target_tokens: int
    """Targets of the whole step, over all workers."""
    divisor: int
    """What the step's loss is divided by: its target tokens, or its rows."""
    tokens: int
    """Tokens of the whole step, over all workers, without padding."""


class Feed:
    def __init__(
        self,
        rows: Rows,
        order: Order,
        world: World,
        *,
        batch_rows: int,
        micro_batch_rows: int,
        pad_id: int,
        packed: bool,
        per_row: bool,
        virtual_tokens: int = 0,
        prefix_tokens: int = 0,
    ) -> None:
        """`per_row`: a step's loss is a mean over rows instead of target tokens."""
        self.rows, self.order, self.world = rows, order, world
        self.batch_rows, self.micro_batch_rows = batch_rows, micro_batch_rows
        self.packed, self.per_row = packed, per_row
        self.collate = partial(
            collate, pad_id=pad_id, packed=packed, virtual_tokens=virtual_tokens, prefix_tokens=prefix_tokens
        )

    def steps(self, cursor: int, count: int) -> Iterator[StepRows]:
        """The next `count` steps from `cursor` on."""
        with ThreadPoolExecutor(1, thread_name_prefix="ftray-feed", initializer=use_one) as pool:
            ahead = pool.submit(self.step_at, cursor) if count else None
            for left in range(count - 1, -1, -1):
                assert ahead is not None
                step = ahead.result()
                ahead = pool.submit(self.step_at, step.cursor[1]) if left else None
                yield step

    def step_at(self, cursor: int) -> StepRows:
        start, stop = step_range(cursor, self.batch_rows, self.order.rows_per_epoch)
        ids = self.order.rows(start, stop)
        shares = assign(ids, self.rows.lengths[ids], self.world.size, self.micro_batch_rows, padded=not self.packed)
        mine = shares[self.world.rank]
        batches = [self.collate([self.rows[int(i)] for i in micro]) for micro in mine]
        targets = int(self.rows.target_counts[ids].sum())
        return StepRows(
            cursor=(start, stop),
            micro_batches=[batch.to(self.world.device) for batch in batches],
            row_ids=list(mine),
            target_tokens=targets,
            divisor=len(ids) if self.per_row else targets,
            tokens=int(self.rows.lengths[ids].sum()),
        )
