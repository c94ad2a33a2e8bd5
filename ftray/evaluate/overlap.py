"""Held-out rows that are in the training rows: exact, and near enough to be the same.

A score on them tells what was remembered. Near duplicates share most of their runs of five words (Broder 1997,
resemblance of shingles).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ftray.evaluate.questions import Asked

NEAR = 0.8
"""Share of the shingles of both that both have, from which two rows are near duplicates."""
_WORDS = 5
_COMMON = 2000
"""A shingle in more rows than this belongs to a template and tells nothing."""


@dataclass(frozen=True)
class Duplicate:
    held_out: Asked
    train: Asked
    likeness: float
    """1: the same words."""


@dataclass(frozen=True)
class Overlap:
    rows: int
    """Held-out ones that were looked at."""
    exact: tuple[Duplicate, ...]
    near: tuple[Duplicate, ...]

    def in_words(self) -> list[str]:
        """Nothing where nothing was found."""
        lines = []
        for found, what in ((self.exact, "are training rows too, word for word"), (self.near, "nearly are")):
            if found:
                first = found[0]
                places = f"{first.held_out.where} is {first.train.where}" if first.train.where else ""
                share = 100 * len(found) / self.rows
                lines.append(f"{len(found):,} of {self.rows:,} held-out rows ({share:.1f} %) {what}; first: {places}")
        return lines


def overlap(train: Sequence[Asked], held_out: Sequence[Asked]) -> Overlap:
    """Each held-out row with the training row that it is most like, where that is like enough."""
    words = [_words(row) for row in held_out]
    wanted: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for i, each in enumerate(words):
        own = shingles(each)
        sizes.append(len(own))
        for shingle in own:
            wanted[shingle].append(i)
    wanted = {shingle: rows for shingle, rows in wanted.items() if len(rows) <= _COMMON}
    exact: dict[int, Duplicate] = {}
    near: dict[int, Duplicate] = {}
    same: dict[str, list[int]] = defaultdict(list)
    for i, each in enumerate(words):
        same[" ".join(each)].append(i)
    for row in train:
        own_words = _words(row)
        text = " ".join(own_words)
        if text in same:
            for i in same[text]:
                exact.setdefault(i, Duplicate(held_out[i], row, 1.0))
            continue
        own = shingles(own_words)
        shared = Counter(i for shingle in own for i in wanted.get(shingle, ()))
        for i, count in shared.items():
            likeness = count / (len(own) + sizes[i] - count)
            if likeness >= NEAR and (i not in near or likeness > near[i].likeness):
                near[i] = Duplicate(held_out[i], row, likeness)
    return Overlap(
        len(held_out),
        tuple(exact[i] for i in sorted(exact)),
        tuple(near[i] for i in sorted(near) if i not in exact),
    )


def _words(row: Asked) -> list[str]:
    turns = " ".join(str(turn["content"]) for turn in row.messages) if row.messages else row.prompt
    return words_of(f"{turns} {row.answer}")


def words_of(text: str) -> list[str]:
    """In lower case, without what stands between them."""
    return re.findall(r"\w+", text.casefold())


def shingles(words: Sequence[str], width: int = _WORDS) -> set[tuple[str, ...]]:
    """All runs of `width` words; the whole where it is shorter."""
    if len(words) <= width:
        return {tuple(words)}
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


class Seen:
    """Texts so far; finds the one that another is most like, by runs of `width` words."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._rows: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def add(self, text: str) -> None:
        own = shingles(words_of(text), self.width)
        for shingle in own:
            self._rows[shingle].append(len(self._sizes))
        self._sizes.append(len(own))

    def nearest(self, text: str) -> tuple[float, int]:
        """(likeness, number of the text in the order of `add`); (0, -1) where none has anything in common."""
        own = shingles(words_of(text), self.width)
        shared = Counter(i for shingle in own for i in self._rows.get(shingle, ()))
        found = ((count / (len(own) + self._sizes[i] - count), -i) for i, count in shared.items())
        likeness, number = max(found, default=(0.0, 1))
        return likeness, -number
