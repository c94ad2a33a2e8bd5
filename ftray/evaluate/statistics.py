"""How far a score can be trusted on so few rows: intervals, and tests between two systems on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftray.evaluate.scores.metric import Measured

SAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Between a system's score and another's, on the same rows."""

    value: float
    """The system's less the other's."""
    low: float
    high: float
    """95 % of the difference's bootstrap samples lie between them."""
    p: float
    """How often a difference as large comes about where it does not matter which system gave which answer."""


def resamples(rows: int, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """float64 [samples, rows]: how often each row is in each bootstrap sample. The same for every system, so that their
    samples compare."""
    random = np.random.default_rng(seed)
    return random.multinomial(rows, np.full(rows, 1 / rows), samples).astype(np.float64)


def interval(measured: Measured, weights: np.ndarray) -> Interval | None:
    """Percentile bootstrap (Efron 1979) over the rows; None for a metric that samples cannot give."""
    if not measured.sampled:
        return None
    return _middle(measured.value(weights @ measured.stats))


def compare(one: Measured, other: Measured, weights: np.ndarray, seed: int = 0) -> Difference | None:
    """`one` less `other`: a paired bootstrap's interval (Koehn 2004), and the p-value of approximate randomization
    (Noreen 1989; Riezler and Maxwell 2005 on why not the bootstrap's), two-sided."""
    if not (one.sampled and other.sampled):
        return None
    value = one.score - other.score
    spread = _middle(one.value(weights @ one.stats) - other.value(weights @ other.stats))
    rows = len(one.stats)
    swapped = np.random.default_rng(seed + 1).integers(0, 2, (len(weights), rows)).astype(np.float64)
    moved = swapped @ (other.stats - one.stats)
    shuffled = one.value(one.stats.sum(0) + moved) - other.value(other.stats.sum(0) - moved)
    as_large = np.abs(shuffled) >= abs(value) - 1e-12
    return Difference(value, spread.low, spread.high, float((1 + as_large.sum()) / (1 + len(weights))))


def _middle(scores: np.ndarray) -> Interval:
    low, high = np.nanpercentile(scores, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return Interval(float(low), float(high))
