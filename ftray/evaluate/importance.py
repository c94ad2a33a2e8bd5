"""How much each parameter of a search mattered: the share of the results' variation that goes with it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

_PARTS = 4
"""Equal parts that a range of numbers is cut into."""


def importances(parameters: Sequence[dict[str, Any]], values: Sequence[float]) -> dict[str, float]:
    """Key → share of the variation of `values` (one a trial) that it explains by itself, 0 to 1, the largest first.

    Epsilon squared (Kelley 1935) of a one-way analysis of variance over the key's values, on the ranks of the results,
    so that one trial that diverged does not decide: unlike the plain share it is 0 on average for a parameter that does
    nothing, however many values it has. A key that only some trials have is judged among these. Keys of which too few
    trials tell anything are left out.
    """
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for p in parameters for key in p):
        with_it = [i for i, p in enumerate(parameters) if key in p]
        ranks = np.argsort(np.argsort([values[i] for i in with_it])).astype(float)
        share = _explained(ranks, _groups([parameters[i][key] for i in with_it]))
        if share is not None:
            found[key] = share
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _groups(values: list[Any]) -> np.ndarray:
    """A group's number for each value: many numbers, or few trials of each, in equal parts of their order with two
    trials at least; other values each by itself."""
    names = sorted({json.dumps(v, sort_keys=True) for v in values})
    many = len(names) > 2 * _PARTS or len(values) < 2 * len(names)
    if many and all(isinstance(v, int | float) for v in values):
        parts = max(1, min(_PARTS, len(values) // 2))
        return np.searchsorted(np.sort(values), values) * parts // len(values)
    return np.array([names.index(json.dumps(v, sort_keys=True)) for v in values])


def _explained(values: np.ndarray, groups: np.ndarray) -> float | None:
    """None: each group is one trial."""
    members = [values[groups == g] for g in np.unique(groups)]
    free = len(values) - len(members)
    total = float(((values - values.mean()) ** 2).sum())
    if free < 1 or len(values) < 4:
        return None
    if len(members) < 2 or total == 0:
        return 0.0
    within = float(sum(((m - m.mean()) ** 2).sum() for m in members))
    return max(0.0, 1 - (within / free) / (total / (len(values) - 1)))
