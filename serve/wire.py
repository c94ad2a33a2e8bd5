"""What an ingress and an engine replica say to each other, and how many small events become few."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ftray.engine.request import Chunk, Event, Finished
from ftray.errors import FtrayError


@dataclass(frozen=True)
class Accepted:
    """First word of a replica about a request that it took."""

    replica: str


@dataclass(frozen=True)
class Refused:
    """First and last word about one that it did not."""

    error: FtrayError | None
    """None: there are too many already."""
    retry_after: float = 1.0


Reply = Accepted | Refused | list[Event]


def merge(events: Iterable[Event]) -> list[Event]:
    """The same events with the chunks of each request joined into one. Requests keep their order of appearance."""
    chunks: dict[str, list[Chunk]] = {}
    ends: dict[str, Finished] = {}
    for event in events:
        if isinstance(event, Chunk):
            chunks.setdefault(event.id, []).append(event)
        else:
            chunks.setdefault(event.id, [])
            ends[event.id] = event
    merged: list[Event] = []
    for id, parts in chunks.items():
        if parts:
            merged.append(parts[0] if len(parts) == 1 else join(parts))
        if id in ends:
            merged.append(ends[id])
    return merged


def join(parts: list[Chunk]) -> Chunk:
    """One chunk that says what `parts` say one after the other; they belong to one request."""
    return Chunk(
        parts[0].id,
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        tuple(logprob for part in parts for logprob in part.logprobs),
    )
