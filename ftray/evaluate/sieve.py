"""Which rows are kept: each goes through the filters in one order, and the first that refuses it counts it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from ftray.config.creation import Filters
from ftray.errors import ConfigError
from ftray.evaluate.overlap import Seen, shingles, words_of
from ftray.evaluate.questions import Asked

_PAIRS = 2
"""Questions are short: one other word among ten changes two of nine pairs, and five of six runs of five."""
_SURE = 0.1
"""A row is refused as another language's where its own is less than this share as probable."""


class Refusal(NamedTuple):
    reason: str
    """One of few, counted."""
    detail: str


class Sieve:
    """Judges rows one after the other and remembers those that it keeps. Raises ConfigError for a language that cannot
    be told."""

    def __init__(
        self, columns: Sequence[str], compared: Sequence[str], filters: Filters, tests: Sequence[Asked]
    ) -> None:
        """`compared`: the columns by which rows are near each other. `tests`: rows that must not be learned."""
        self.columns, self.compared, self.filters = tuple(columns), tuple(compared), filters
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in filters.refuse]
        if filters.language is not None and filters.language not in _identifier().labels:
            known = ", ".join(sorted(_identifier().labels))
            raise ConfigError(f"{filters.language!r} cannot be told; known: {known}", where="filters.language")
        self._exact: set[tuple[str, ...]] = set()
        self._kept = Seen(_PAIRS)
        self._tests = tests
        self._test_questions = Seen(_PAIRS)
        self._test_runs: dict[tuple[str, ...], int] = {}
        for number, test in enumerate(tests):
            self._test_questions.add(test.prompt)
            for run in self._runs(f"{test.prompt} {test.answer}"):
                self._test_runs.setdefault(run, number)

    def judge(self, row: Mapping[str, Any]) -> Refusal | None:
        """Why this row is not kept; None: it is, and later ones are compared with it."""
        for column in self.columns:
            if refusal := self._column(column, row.get(column)):
                return refusal
        text = "\n".join(row[column] for column in self.columns)
        if refusal := self._text(text) or self._tested(row, text):
            return refusal
        words = tuple(words_of(text))
        if words in self._exact:
            return Refusal("duplicate", "")
        asked = "\n".join(row[column] for column in self.compared)
        if self.filters.near is not None:
            likeness, number = self._kept.nearest(asked)
            if likeness >= self.filters.near:
                return Refusal("near duplicate", f"{likeness:.2f} like kept row {number + 1}")
            self._kept.add(asked)
        self._exact.add(words)
        return None

    def _column(self, column: str, value: Any) -> Refusal | None:
        if value is None:
            return Refusal("missing column", column)
        if not isinstance(value, str):
            return Refusal("not text", column)
        fewest, most = self.filters.characters.get(column, (1, None))
        length = len(value.strip())
        if length < max(fewest, 1):
            return Refusal("too short", f"{column}: {length:,} characters")
        if most is not None and length > most:
            return Refusal("too long", f"{column}: {length:,} characters")
        return None

    def _text(self, text: str) -> Refusal | None:
        for pattern in self._patterns:
            if found := pattern.search(text):
                return Refusal("refused words", found.group()[:80])
        if self.filters.language is not None:
            shares = dict(_identifier().rank(text))
            best = max(shares, key=lambda language: shares[language])
            if shares[self.filters.language] < _SURE * shares[best]:
                return Refusal("other language", str(best))
        return None

    def _tested(self, row: Mapping[str, Any], text: str) -> Refusal | None:
        if not self._tests:
            return None
        shared = next((self._test_runs[run] for run in self._runs(text) if run in self._test_runs), None)
        if shared is not None:
            return Refusal("in a test file", f"{self.filters.shared_words} words of {self._tests[shared].where}")
        if self.filters.near is not None:
            likeness, number = self._test_questions.nearest(row[self.columns[0]])
            if likeness >= self.filters.near:
                return Refusal("in a test file", f"{likeness:.2f} like {self._tests[number].where}")
        return None

    def _runs(self, text: str) -> set[tuple[str, ...]]:
        words = words_of(text)
        return shingles(words, self.filters.shared_words) if len(words) >= self.filters.shared_words else set()


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
