"""What every metric is: one pass over the rows gives sums, and sums give the score of any sample of the rows.

So a corpus score (BLEU, METEOR …) of a thousand bootstrap samples costs one product of two matrices, and no answer is
scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

References = Sequence[Sequence[str]]
"""For each row, the texts that would have been right: at least one."""
Value = Callable[[np.ndarray], np.ndarray]
"""[B, S] sums over the rows of B samples → [B] scores."""


@dataclass(frozen=True)
class Measured:
    """One system's answers, measured."""

    stats: np.ndarray
    """float64 [N, S]: what each row adds; the first column is 1, so that its sum counts the rows."""
    value: Value
    by_row: np.ndarray
    """float64 [N]: a score of each row alone, to find the best and the worst. For some corpus metrics a stand-in."""
    sampled: bool = True
    """False: sums do not give the score of a sample (distinct n-grams are a union), so that there is no interval."""

    score: float = field(init=False)
    """Of all rows. Taken at once: METEOR's process may be gone when it is asked for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", float(self.value(self.stats.sum(0)[None])[0]))


class Metric:
    """A metric over one set of rows. Made once for the references; `measure` is called for each system."""

    name: str
    higher_is_better = True
    unit = ""
    """What one is, where it is not a share."""

    def __init__(self, references: References) -> None:
        self.references = [list(texts) for texts in references]

    def measure(self, answers: Sequence[str]) -> Measured:
        """`answers`: one for each row."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it holds (METEOR: a Java process)."""


def mean_of(values: Sequence[float] | np.ndarray, sampled: bool = True) -> Measured:
    """A metric that is the mean of its rows."""
    rows = np.asarray(values, np.float64)
    return Measured(np.stack([np.ones_like(rows), rows], 1), mean, rows, sampled)


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 1] / sums[:, 0]
