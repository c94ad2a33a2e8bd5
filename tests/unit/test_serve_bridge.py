"""Between an engine's thread and an event loop: what is told when, and through which outbox."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from ftray.engine.request import Chunk, Event, Finished, Request, Usage
from serve import replica
from serve.replica import Bridge
from serve.wire import Accepted


class Said:
    """An engine that says what the test puts in, a list of events a step."""

    def __init__(self) -> None:
        self.steps: queue.Queue[list[Event]] = queue.Queue()
        self.cancelled: list[str] = []
        self._next: list[Event] = []

    def add(self, request: Request) -> None:
        pass

    def cancel(self, id: str) -> None:
        self.cancelled.append(id)

    def wait(self, timeout: float) -> bool:
        try:
            self._next = self.steps.get(timeout=0.01)
        except queue.Empty:
            return False
        return True

    def step(self) -> list[Event]:
        return self._next

    def close(self) -> None:
        pass


def with_bridge(test: Callable[[Bridge, Said], Awaitable[None]]) -> None:
    async def whole() -> None:
        engine = Said()
        bridge = Bridge(lambda: engine, "here")  # type: ignore[arg-type,return-value]
        try:
            await asyncio.wait_for(test(bridge, engine), 60)
        finally:
            await asyncio.to_thread(bridge.close)

    asyncio.run(whole())


def end(id: str) -> Finished:
    return Finished(id, "stop", Usage(1, 0, 2))


def test_an_answer_that_does_not_stream_is_told_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would know what was written when its client leaves."""
    monkeypatch.setattr(replica, "TELL_SECONDS", 0.05)

    async def test(bridge: Bridge, engine: Said) -> None:
        answer = bridge.run(Request("a", (1,)), "ingress", False)
        assert await anext(answer) == Accepted("here")
        engine.steps.put([Chunk("a", "x", (7,)), Chunk("a", "y", (8,))])
        assert await anext(answer) == [Chunk("a", "xy", (7, 8))]
        engine.steps.put([Chunk("a", "z", (9,)), end("a")])
        assert [item async for item in answer] == [[Chunk("a", "z", (9,)), end("a")]]
        assert not bridge._running

    with_bridge(test)


def test_an_answer_that_ends_at_once_is_told_whole() -> None:
    async def test(bridge: Bridge, engine: Said) -> None:
        answer = bridge.run(Request("a", (1,)), "ingress", False)
        assert await anext(answer) == Accepted("here")
        engine.steps.put([end("a")])
        await bridge._running["a"].done.wait()
        assert [item async for item in answer] == [[end("a")]]

    with_bridge(test)


def test_a_reader_that_was_too_slow_takes_its_own_outbox_with_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "MOST_EVENTS", 3)
    monkeypatch.setattr(replica, "IDLE_SECONDS", 0.2)

    async def test(bridge: Bridge, engine: Said) -> None:
        old = bridge.run(Request("old", (1,)), "ingress", True)
        await anext(old)
        first = bridge.events("ingress")
        reading: Any = asyncio.ensure_future(anext(first))
        engine.steps.put([Chunk("old", "x", (7,))] * 9)
        assert len(await reading) == 1
        assert engine.cancelled == ["old"]
        assert not bridge._outboxes, "it overflowed"
        await old.aclose()
        new = bridge.run(Request("new", (1,)), "ingress", True)
        await anext(new)
        assert [batch async for batch in first] == [], "nothing more for the first"
        second = bridge.events("ingress")
        engine.steps.put([Chunk("new", "y", (8,)), end("new")])
        assert await anext(second) == [Chunk("new", "y", (8,)), end("new")]
        await new.aclose()
        await second.aclose()

    with_bridge(test)
