"""The state of choosing one request's tokens: what was said, which number is drawn next, when it ends."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftray.engine.request import Logprob, Sampling
from ftray.errors import FtrayError, RequestError

if TYPE_CHECKING:
    from ftray.engine.grammar import Matcher

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would leave the range of 32-bit numbers."""

MAX_BIAS = 1e4
"""More would leave too few digits of the logits themselves."""


@dataclass(frozen=True, slots=True)
class Chosen:
    token: int
    """-1 where there is an `error`."""
    logprob: Logprob | None = None
    finish: Literal["stop", "length"] | None = None
    """With the last token: `stop` for an end token or a complete grammar, `length` for `max_tokens`."""
    is_end: bool = False
    """The token is an end token, and no part of the text."""
    error: FtrayError | None = None
    """Nothing can be chosen for this row; the others are not concerned."""


class Choice:
    """One request's sampling and how far it has come. A `Sampler` reads it and moves it on.

    Raises RequestError for values that have no meaning.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        vocabulary: int,
        ends: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        """`vocabulary` is the number of logits, `ends` the base's end tokens. `matcher` is that of `sampling.grammar`,
        from `Grammars.matcher`."""
        check(sampling, vocabulary)
        assert (matcher is None) == (sampling.grammar is None), "a grammar needs its matcher"
        self.sampling, self.matcher = sampling, matcher
        self.count = 0
        """Tokens chosen so far."""
        self.greedy = sampling.temperature < GREEDY_BELOW
        self.seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        self._ends = frozenset(ends)
        self.bias = _sparse(sampling.logit_bias)
        """(ids int64 [k], values float32 [k]) that are added to the logits; None for nothing."""
        self.said = _Said(sampling, prompt) if _has_penalty(sampling) else None
        """Tokens that penalties are about; None without penalties."""

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next token. It depends on the seed and the token's place alone."""
        return uniform(self.seed, self.count)

    def accept(self, token: int, logprob: Logprob | None) -> Chosen:
        """Move on by a token."""
        is_end = token in self._ends and (self.matcher is not None or not self.sampling.ignore_end)
        if self.matcher is not None and (error := self.matcher.accept(token)) is not None:
            return Chosen(-1, error=error)
        if self.said is not None:
            self.said.add(token)
        self.count += 1
        finish: Literal["stop", "length"] | None = None
        if is_end or (self.matcher is not None and self.matcher.complete):
            finish = "stop"
        elif self.count >= self.sampling.max_tokens:
            finish = "length"
        return Chosen(token, logprob, finish, is_end)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1), a multiple of 2^-52, that looks random and is a pure function of (seed, index)."""
    key = (seed % (1 << 64)).to_bytes(8, "little")
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8, key=key).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


class _Said:
    """Tokens of the prompt and the answer, each once, with their number in the answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        of_prompt = (
            np.unique(np.asarray(prompt, np.int64)) if sampling.repetition_penalty != 1 else np.empty(0, np.int64)
        )
        self._n = len(of_prompt)
        self._place = {int(token): i for i, token in enumerate(of_prompt)}
        self._ids = np.concatenate([of_prompt, np.zeros(64, np.int64)])
        self._counts = np.zeros(len(self._ids), np.float32)

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            if self._n == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            place = self._place[token] = self._n
            self._ids[place] = token
            self._n += 1
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [k], each once."""
        return self._ids[: self._n]

    @property
    def counts(self) -> np.ndarray:
        """float32 [k]: how often the answer has each."""
        return self._counts[: self._n]


def _has_penalty(sampling: Sampling) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)


def _sparse(bias: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray] | None:
    if not bias:
        return None
    return np.fromiter(bias.keys(), np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))


def check(sampling: Sampling, vocabulary: int) -> None:
    """Raises RequestError for values that have no meaning, with the field as `where`."""
    for name, good, needed in (
        ("max_tokens", sampling.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= sampling.temperature < math.inf, "0 or more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k >= 0, "0 or more"),
        ("min_p", 0 <= sampling.min_p <= 1, "from 0 to 1"),
        ("presence_penalty", math.isfinite(sampling.presence_penalty), "a number"),
        ("frequency_penalty", math.isfinite(sampling.frequency_penalty), "a number"),
        ("repetition_penalty", 0 < sampling.repetition_penalty < math.inf, "above 0"),
        ("logprobs", sampling.logprobs is None or 0 <= sampling.logprobs <= vocabulary, f"from 0 to {vocabulary:,}"),
        ("stop", all(sampling.stop), "strings that are not empty"),
    ):
        if not good:
            raise RequestError(f"{getattr(sampling, name)} has no meaning; it must be {needed}", where=name)
    for token, value in sampling.logit_bias.items():
        if not 0 <= token < vocabulary:
            raise RequestError(f"there is no token {token}; the vocabulary has {vocabulary:,}", where="logit_bias")
        if not abs(value) <= MAX_BIAS:
            raise RequestError(f"{value} for token {token} is out of range: ±{MAX_BIAS:,.0f}", where="logit_bias")
