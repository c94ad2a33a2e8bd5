"""Which row is trained when: a pure function of (seed, epoch, sizes, weights). numpy alone.

The position of a run is one number, the cursor: rows consumed since the start. An epoch has N = `rows_per_epoch`
positions; position p of epoch e is row `permutation(p)` under a key made of seed and epoch. The permutation is a
Feistel network with cycle-walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5): any
position is found on its own, in constant time and without a list of N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_ROUNDS = 10


class Order:
    """The order of a mixture. `sizes[s]` rows of source s have the ids from sum(sizes[:s]) on; `weights[s]` is how many
    copies of each an epoch has. A fractional weight takes k copies of all and one more of a part that moves on from
    epoch to epoch, so that over time every row of a source is seen equally often."""

    def __init__(self, seed: int, sizes: Sequence[int], weights: Sequence[float]) -> None:
        if len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes, {len(weights)} weights")
        self.seed, self.sizes, self.weights = seed, tuple(int(n) for n in sizes), tuple(float(w) for w in weights)
        self._whole = np.array([math.floor(w) for w in self.weights], np.int64)
        self._part = np.array([_part(n, w) for n, w in zip(self.sizes, self.weights, strict=True)], np.int64)
        counts = self._whole * np.array(self.sizes, np.int64) + self._part
        self._first_position = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._first_id = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.rows_per_epoch = int(self._first_position[-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """int64 row ids at cursor positions [start, stop), over the ends of epochs if need be."""
        if not 0 <= start <= stop:
            raise ValueError(f"no positions: [{start}, {stop})")
        if start == stop or self.rows_per_epoch == 0:
            return np.empty(0, np.int64)
        parts = []
        for epoch in range(start // self.rows_per_epoch, (stop - 1) // self.rows_per_epoch + 1):
            zero = epoch * self.rows_per_epoch
            inside = np.arange(max(start - zero, 0), min(stop - zero, self.rows_per_epoch), dtype=np.int64)
            parts.append(self._rows_of_epoch(epoch, inside))
        return np.concatenate(parts)

    def _rows_of_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        virtual = permute(positions, self.rows_per_epoch, _key(self.seed, 1, epoch))
        source = np.searchsorted(self._first_position, virtual, side="right") - 1
        ids = np.empty_like(virtual)
        for s in np.unique(source):
            mine = source == s
            ids[mine] = self._first_id[s] + self._row_in_source(int(s), epoch, virtual[mine] - self._first_position[s])
        return ids

    def _row_in_source(self, s: int, epoch: int, copy: np.ndarray) -> np.ndarray:
        """Row of source s behind its `copy`-th place in the epoch: whole passes first, then the moving part."""
        n, whole = self.sizes[s], int(self._whole[s])
        rows = copy % n
        extra = copy >= whole * n
        if extra.any():
            turn = (epoch * int(self._part[s]) + copy[extra] - whole * n) % n
            rows[extra] = permute(turn, n, _key(self.seed, 2, s))
        return rows


def _part(n: int, weight: float) -> int:
    """Rows of a fractional weight in an epoch; a source that would be left out altogether gives one."""
    part = round((weight - math.floor(weight)) * n)
    return max(part, 1) if weight < 1 and n else part


def step_range(cursor: int, batch_rows: int, rows_per_epoch: int) -> tuple[int, int]:
    """Cursor positions [start, stop) of the next step. A step ends where the epoch ends: its last one may be short."""
    epoch_end = (cursor // rows_per_epoch + 1) * rows_per_epoch
    return cursor, min(cursor + batch_rows, epoch_end)


def assign(
    row_ids: np.ndarray, lengths: np.ndarray, workers: int, micro_batch_rows: int, *, padded: bool = False
) -> list[list[np.ndarray]]:
    """Deal the rows of one step to workers and micro-batches: `result[worker][micro_batch]` is int64 row ids.

    `lengths[i]` is the tokens of `row_ids[i]`. Tokens are balanced, longest row first to whoever has fewest; no worker
    gets more than its share of rows, rounded up. Every worker gets the same number of micro-batches; some may be
    empty. With `padded`, rows of like length share a micro-batch, since each is then padded to its longest.
    """
    row_ids, lengths = np.asarray(row_ids, np.int64), np.asarray(lengths)
    if len(row_ids) != len(lengths):
        raise ValueError(f"{len(row_ids)} rows, {len(lengths)} lengths")
    share = -(-len(row_ids) // workers)
    count = max(1, -(-share // micro_batch_rows))
    by_worker = _deal(np.arange(len(row_ids)), lengths, workers, share)
    if padded:
        batches = [np.array_split(mine[np.argsort(-lengths[mine], kind="stable")], count) for mine in by_worker]
        return [[row_ids[np.sort(batch)] for batch in worker] for worker in batches]
    return [[row_ids[batch] for batch in _deal(mine, lengths, count, micro_batch_rows)] for mine in by_worker]


def _deal(rows: np.ndarray, lengths: np.ndarray, piles: int, most: int) -> list[np.ndarray]:
    """Rows dealt to piles of at most `most`, longest first, each to the pile with fewest tokens that has room.
    (Graham 1969: at most 4/3 of the best possible.) Within a pile rows keep their order."""
    tokens, dealt = [0] * piles, [[] for _ in range(piles)]  # type: tuple[list[int], list[list[int]]]
    for row in rows[np.argsort(-lengths[rows], kind="stable")]:
        pile = min((p for p in range(piles) if len(dealt[p]) < most), key=lambda p: (tokens[p], len(dealt[p]), p))
        dealt[pile].append(int(row))
        tokens[pile] += int(lengths[row])
    return [np.sort(np.array(pile, np.int64)) for pile in dealt]


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Images (int64) of positions in [0, n) under the permutation of [0, n) that `key` picks."""
    bits = max(2, (n - 1).bit_length())
    values = np.asarray(positions).astype(np.uint64)
    result = _feistel(values, bits, key)
    while (outside := result >= n).any():  # the domain is below 2n (or 4), so each walk is short
        result[outside] = _feistel(result[outside], bits, key)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, key: int) -> np.ndarray:
    """A permutation of [0, 2**bits): unbalanced Feistel rounds, the low half of bits // 2 bits."""
    low_bits, high_bits = bits // 2, bits - bits // 2
    low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
    low, high = values & low_mask, values >> np.uint64(low_bits)
    for number in range(_ROUNDS):
        word = np.uint64(_key(key, number))
        if number % 2:
            high = high ^ (_mix(low ^ word) & high_mask)
        else:
            low = low ^ (_mix(high ^ word) & low_mask)
    return (high << np.uint64(low_bits)) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014); arithmetic modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int) -> int:
    """One 64-bit key out of several whole numbers."""
    key = 0
    for part in parts:
        key = _mix_int((key ^ part) + 0x9E3779B97F4A7C15)
    return key


def _mix_int(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)
