"""Packing for good: many short rows laid end to end in rows of exactly `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from ftray.data.shards import Packed


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices so that no bin's lengths sum to more than `capacity`: best fit, longest first (Johnson 1973: at
    most 11/9 of the fewest bins possible, plus 4). Bins stand in the order of their first index, indices ascend.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            bins.append([i])
            left, number = capacity - lengths[i], len(bins) - 1
        else:
            left, number = room.pop(at)
            bins[number].append(i)
            left -= lengths[i]
        if left:
            insort(room, (left, number))
    return sorted(sorted(members) for members in bins)


def pack(rows: Sequence[Packed], capacity: int, pad_id: int) -> list[Packed]:
    """Rows of exactly `capacity` tokens; what is left of one is filled with padding, a last sequence of its own
    without targets, so that no sequence sees it."""
    return [
        _join([rows[i] for i in members], capacity, pad_id)
        for members in best_fit([len(r.tokens) for r in rows], capacity)
    ]


def _join(rows: Sequence[Packed], capacity: int, pad_id: int) -> Packed:
    sequences = [n for row in rows for n in row.sequence_lengths]
    left = capacity - sum(sequences)
    padding = [np.full(left, pad_id, np.int32)] if left else []
    tokens = np.concatenate([*(row.tokens for row in rows), *padding])
    targets = np.concatenate([*(row.targets for row in rows), np.zeros(left, np.bool_)])
    origins = [n for row in rows for n in row.origins]
    return Packed(tokens, targets, [*sequences, left] if left else sequences, origins)
