"""BLEU and NIST as NIST's `mteval-v13a` computes them, which the E2E challenge reports.

Papineni et al. 2002 (BLEU) and Doddington 2002 (NIST), lower-cased, with the script's own tokens; the brevity penalty
of BLEU takes the reference closest in length, that of NIST the mean length. Both lie on the scale of the challenge:
BLEU from 0 to 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from ftray.evaluate.scores.metric import Measured, Metric, References

_BLEU_N, _NIST_N = 4, 5
_NIST_BETA = -math.log(0.5) / math.log(1.5) ** 2
"""The penalty is one half where the answers have two thirds of the references' words."""

_ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_RULES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"([{-~\[-` -&(-+:-@/])", r" \1 "),
        (r"([^0-9])([.,])", r"\1 \2 "),
        (r"([.,])([^0-9])", r" \1 \2"),
        (r"([0-9])(-)", r"\1 \2 "),
    )
]
Grams = Counter[tuple[str, ...]]


@lru_cache(maxsize=1 << 16)
def tokens(text: str) -> tuple[str, ...]:
    """The script's tokens: ASCII punctuation apart, periods and commas too unless between digits."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in _ENTITIES:
        text = text.replace(entity, character)
    text = f" {text.lower()} "
    for pattern, by in _RULES:
        text = pattern.sub(by, text)
    return tuple(text.split())


def grams(words: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _highest(counters: Sequence[Grams]) -> Grams:
    """The largest count of each n-gram in any of them."""
    highest: Grams = Counter()
    for counter in counters:
        highest |= counter
    return highest


class Bleu(Metric):
    name = "bleu"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        words = [[tokens(text) for text in texts] for texts in references]
        self._lengths = [[len(each) for each in row] for row in words]
        self._highest = [[_highest([grams(w, n) for w in row]) for n in _orders(_BLEU_N)] for row in words]

    def measure(self, answers: Sequence[str]) -> Measured:
        stats = np.array([self._row(i, tokens(answer)) for i, answer in enumerate(answers)], np.float64)
        return Measured(stats, bleu, bleu(stats))

    def _row(self, i: int, words: Sequence[str]) -> list[float]:
        """[1, words, words of the closest reference, n-grams that match for each n, n-grams for each n]"""
        closest = min(self._lengths[i], key=lambda length: (abs(length - len(words)), length))
        own = [grams(words, n) for n in _orders(_BLEU_N)]
        matches = [(mine & theirs).total() for mine, theirs in zip(own, self._highest[i], strict=True)]
        return [1, len(words), closest, *matches, *(mine.total() for mine in own)]


def bleu(sums: np.ndarray) -> np.ndarray:
    """[B, 3 + 2·4] → [B]. An order without any match counts as half of one, a quarter for the next such, and so on (the
    script's smoothing)."""
    words, closest, matches, totals = sums[:, 1], sums[:, 2], sums[:, 3:7], sums[:, 7:11]
    none = (matches == 0) & (totals > 0)
    smoothed = np.where(none, 0.5 ** np.cumsum(none, 1), matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(totals > 0, np.log(smoothed / totals), -np.inf)
        penalty = np.where(words < closest, 1 - closest / words, 0.0)
        found = np.exp(logs.mean(1) + penalty)
    return np.where((words > 0) & (matches[:, 0] > 0), np.nan_to_num(found), 0.0)


class Nist(Metric):
    name = "nist"
    unit = "bits"

    def __init__(self, references: References) -> None:
        super().__init__(references)
        words = [[tokens(text) for text in texts] for texts in references]
        self._mean_lengths = [sum(map(len, row)) / len(row) for row in words]
        self._highest = [[_highest([grams(w, n) for w in row]) for n in _orders(_NIST_N)] for row in words]
        counts: Grams = Counter()
        for row in words:
            for each in row:
                for n in _orders(_NIST_N):
                    counts.update(grams(each, n))
        total = sum(len(each) for row in words for each in row)
        self._bits = {g: math.log2((counts[g[:-1]] if len(g) > 1 else total) / count) for g, count in counts.items()}
        """How much each n-gram of the references tells, once the words before its last are known. Of all rows, also
        where a sample is scored."""

    def measure(self, answers: Sequence[str]) -> Measured:
        stats = np.array([self._row(i, tokens(answer)) for i, answer in enumerate(answers)], np.float64)
        return Measured(stats, nist, nist(stats))

    def _row(self, i: int, words: Sequence[str]) -> list[float]:
        """[1, words, mean words of the references, bits that match for each n, n-grams for each n]"""
        own = [grams(words, n) for n in _orders(_NIST_N)]
        bits = [
            sum(self._bits[g] * count for g, count in (mine & theirs).items())
            for mine, theirs in zip(own, self._highest[i], strict=True)
        ]
        return [1, len(words), self._mean_lengths[i], *bits, *(mine.total() for mine in own)]


def nist(sums: np.ndarray) -> np.ndarray:
    """[B, 3 + 2·5] → [B]"""
    words, expected, bits, totals = sums[:, 1], sums[:, 2], sums[:, 3:8], sums[:, 8:13]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(totals > 0, bits / totals, 0.0).sum(1)
        ratio = np.clip(words / expected, None, 1.0)
        penalty = np.exp(-_NIST_BETA * np.log(ratio) ** 2)
    return np.where(words > 0, found * penalty, 0.0)


def _orders(n: int) -> Iterator[int]:
    yield from range(1, n + 1)
