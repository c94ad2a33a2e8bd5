"""The wire between an ingress and its replicas: an answer is whole, in whatever order its two calls are heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from ftray.engine.request import Chunk, Finished, Request, Usage
from serve.link import Link
from serve.wire import Accepted

END = Finished("new", "stop", Usage(1, 0, 2))


class Late:
    """A replica whose word that it took a request is late: the request's events come first."""

    def __init__(self, before: list[Any], after: list[Any]) -> None:
        self.before, self.after = before, after
        self.reading, self.told, self.accepted = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncGenerator[Any, None]:
        if request.id == "old":  # what makes the link read
            yield Accepted("replica")
            await self.accepted.wait()
            return
        await self.told.wait()
        yield Accepted("replica")
        self.accepted.set()

    async def events(self, ingress: str, replica: str) -> AsyncGenerator[list[Any], None]:
        self.reading.set()
        if self.before:
            batch, self.before = self.before, []
            yield batch
            await asyncio.sleep(0)
            self.told.set()
        await self.accepted.wait()
        yield [*self.after, Finished("old", "stop", Usage(1, 0, 0))]
        await asyncio.sleep(60)

    async def stats(self) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("split", [1, 2, 3])
def test_events_that_come_before_the_word_are_kept(split: int) -> None:
    events = [Chunk("new", "A"), Chunk("new", "h, cheese"), END]

    async def ask() -> tuple[str, Finished | None]:
        replicas = Late([], events[split:])
        link = Link(replicas, "ingress", 1 << 20)
        starting = asyncio.create_task(link.start(Request("new", (1,)), streams=True))
        await asyncio.sleep(0)  # the request is on its way
        await asyncio.sleep(0)
        replicas.before = events[:split]
        await link.start(Request("old", (1,)), streams=True)
        answer = await asyncio.wait_for(starting, 5)
        text, end = "", None
        while batch := await asyncio.wait_for(answer.next(), 5):
            text += "".join(event.text for event in batch if isinstance(event, Chunk))
            end = next((event for event in batch if isinstance(event, Finished)), end)
        assert not link._asked
        return text, end

    assert asyncio.run(ask()) == ("Ah, cheese", END)
