"""Who is next: fair among tenants by the tokens that each has been served (virtual token counters, Sheng et al. 2024,
"Fairness in Serving Large Language Models", algorithm 1), first come first served within one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

Item = TypeVar("Item")

READ, WRITTEN = 1, 2
"""What a token of a prompt and one of an answer count, as in the paper: the latter takes a step of its own."""


class FairQueue(Generic[Item]):
    def __init__(self) -> None:
        self._waiting: dict[str, list[Item]] = {}
        self._served: dict[str, float] = {}
        self._running: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(items) for items in self._waiting.values())

    def push(self, tenant: str, item: Item) -> None:
        if tenant not in self._waiting and not self._running[tenant]:
            # One that was away gets no credit for it: it starts level with the least served of those who are here.
            here = [self._served[t] for t in self._active()]
            self._served[tenant] = max(self._served.get(tenant, 0.0), min(here, default=0.0))
        self._waiting.setdefault(tenant, []).append(item)

    def pop(self, ready: Callable[[Item], bool], most: int | None = None) -> Item | None:
        """The next item that is `ready`; None if there is none. While several tenants are here, none has more than
        `most` running."""
        several = len(self._waiting) > 1
        for tenant in sorted(self._waiting, key=lambda t: self._served[t]):
            if several and most is not None and self._running[tenant] >= most:
                continue
            for i, item in enumerate(self._waiting[tenant]):
                if ready(item):
                    self._take(tenant, i)
                    self._running[tenant] += 1
                    return item
        return None

    def remove(self, tenant: str, item: Item) -> None:
        """Out of the queue, unserved."""
        self._take(tenant, self._waiting[tenant].index(item))
        self._forget(tenant)

    def charge(self, tenant: str, read: int = 0, written: int = 0) -> None:
        """`tenant` has been served so many tokens. What an item's prompt takes is charged when it is popped, as in the
        paper: many may be popped at once."""
        self._served[tenant] += READ * read + WRITTEN * written

    def done(self, tenant: str) -> None:
        """One that was popped has ended."""
        self._running[tenant] -= 1
        self._forget(tenant)

    def waiting(self) -> Iterator[Item]:
        for items in self._waiting.values():
            yield from items

    def _take(self, tenant: str, index: int) -> None:
        items = self._waiting[tenant]
        del items[index]
        if not items:
            del self._waiting[tenant]

    def _active(self) -> set[str]:
        return self._waiting.keys() | {t for t, n in self._running.items() if n}

    def _forget(self, tenant: str) -> None:
        """A tenant who has left keeps a count only while it is more than what he would start with."""
        if not self._running[tenant]:
            del self._running[tenant]
            if tenant not in self._waiting:
                here = self._active()
                least = min((self._served[t] for t in here), default=None)
                self._served = {t: s for t, s in self._served.items() if t in here or (least is not None and s > least)}


def shares(wanted: Mapping[str, int], left: int) -> dict[str, int]:
    """What each tenant gets of `left`: nobody more than he wants, and nobody more than another who wants more still."""
    found = {}
    for i, tenant in enumerate(sorted(wanted, key=lambda t: wanted[t])):
        found[tenant] = min(wanted[tenant], -(-left // (len(wanted) - i)))
        left -= found[tenant]
    return found
