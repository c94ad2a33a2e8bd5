"""A request on its way through the engine, and which slot whose keys and values are in."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from ftray.engine.adapters import Held
from ftray.engine.choice import Choice
from ftray.engine.request import Request, Usage
from ftray.engine.text import TextStream
from ftray.model.served import Adapter

Tokens = list[int] | tuple[int, ...]
VIRTUAL = -1
"""Stands for a virtual token where tokens are listed."""
WORTH_COPYING = 16
"""Places: a shorter common beginning is read again rather than copied."""


@dataclass(eq=False)
class Sequence:
    request: Request
    choice: Choice
    text: TextStream
    held: Held | None = None
    tokens: list[int] = field(default_factory=list)
    """Virtual ones, the prompt, the answer; empty until it runs. A token's place in its slot is its place here. While
    the prompt is read, what is expected stands where the answer will."""
    begin: int = 0
    """Where the answer begins."""
    done: int = 0
    """Tokens whose keys and values are in the slot."""
    cached: int = 0
    """Tokens of the prompt that were found there."""
    slot: int | None = None
    """None: it waits."""
    kept: list[Tensor] = field(default_factory=list)
    """Logits [·, vocabulary] of what is expected, while it is read in several steps."""
    expected: tuple[float, ...] = ()
    """Log probabilities of what is expected, once it is read."""

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def digest(self) -> str | None:
        return self.request.adapter.digest if self.request.adapter else None

    @cached_property
    def owner(self) -> tuple[str, str | None]:
        """Whose keys and values these are: nobody else's requests may begin with them."""
        return self.tenant, self.digest

    @property
    def adapter(self) -> Adapter | None:
        """None: the base alone, or not read yet."""
        return self.held.adapter if self.held else None

    @property
    def virtual_tokens(self) -> int:
        return self.adapter.virtual_tokens if self.adapter else 0

    @property
    def undone(self) -> int:
        """Tokens that are still to go through the base; 1 while the answer is being written."""
        return len(self.tokens) - self.done

    @cached_property
    def opening(self) -> tuple[str, str | None, tuple[int, ...]] | None:
        """Equal for those whose beginnings may be worth sharing; None for a prompt that is too short."""
        first = self.request.prompt[:WORTH_COPYING]
        return (*self.owner, first) if len(self.request.prompt) > WORTH_COPYING else None

    def begins(self) -> None:
        """Lay out the tokens, now that the adapter is known."""
        self.tokens = [VIRTUAL] * self.virtual_tokens + list(self.request.prompt)
        self.begin = len(self.tokens)
        self.tokens += self.request.expected

    def wanted(self, first: int, count: int) -> range:
        """Which of `count` tokens from place `first` on must tell what follows them: the last of all, and while the
        prompt is read those that what is expected follows."""
        reads = self.request.expected and not self.choice.count
        return range(max(first, (self.begin if reads else len(self.tokens)) - 1), first + count)

    def begins_answer(self) -> None:
        """What is expected has been read: from here on the answer's own tokens stand there."""
        del self.tokens[self.begin :]
        self.done, self.kept = self.begin, []

    def usage(self) -> Usage:
        return Usage(len(self.request.prompt), self.cached, self.choice.count)


class SlotTable:
    """Which slots are free, and what each still knows: the last sequence that was in it."""

    def __init__(self, count: int) -> None:
        self.free = dict.fromkeys(range(count))
        """In the order in which they became free."""
        self._last: list[Sequence | None] = [None] * count

    def take(self, sequence: Sequence, reuse: bool) -> tuple[int, int | None]:
        """Give `sequence` a free slot; there must be one. Returns (places of it that are there already, the slot that
        they must be copied from, None if they are in its own)."""
        known, source = self._longest(sequence) if reuse else (0, None)
        if source in self.free:
            slot, source = source, None
        else:
            slot = next(iter(self.free))
        del self.free[slot]
        self._last[slot], sequence.slot = sequence, slot
        return known, source

    def give_back(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        assert sequence.slot not in self.free
        self.free[sequence.slot] = None

    def forget(self, slot: int) -> None:
        """What is in the slot is nobody's to reuse."""
        self._last[slot] = None

    def _longest(self, sequence: Sequence) -> tuple[int, int | None]:
        best, found = 0, None
        most = sequence.begin - 1  # the prompt's last token goes through the base: what comes of it is wanted
        for slot, last in enumerate(self._last):
            if last is None or last.owner != sequence.owner:
                continue
            free = slot in self.free
            needed = best + (not free or found is None or found in self.free)  # of two alike the free one
            needed = needed if free else max(needed, WORTH_COPYING)
            high = min(most, last.done)
            if high < needed or sequence.tokens[needed - 1] != last.tokens[needed - 1]:
                continue
            if (length := common(sequence.tokens, last.tokens, high)) >= needed:
                best, found = length, slot
        return best, found if best else None


def common(a: Tokens, b: Tokens, most: int) -> int:
    """Length of the common beginning of two lists or tuples, at most `most`."""
    low, high = 0, min(len(a), len(b), most)
    if a[:high] == b[:high]:
        return high
    while low < high - 1:  # a[:low] equals, a[:high] does not
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
