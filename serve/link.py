"""The ingress's side of the wire: sends requests to engine replicas, and hands what comes back to whom it is for."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ftray.engine.request import Chunk, Event, Finished, Request, Usage

from .errors import ApiError, of_engine, overloaded, replica_lost
from .wire import Accepted, Refused, Reply, merge

log = logging.getLogger("ray.serve")
STATS_SECONDS = 5.0
LATE_SECONDS = 10.0
"""How long the last events of an answer may come after its call has ended."""


class Replicas(Protocol):
    """What a link asks of Ray Serve's handle; the tests have another."""

    def run(self, request: Request, ingress: str, streams: bool) -> AsyncGenerator[Reply, None]: ...

    def events(self, ingress: str, replica: str) -> AsyncGenerator[list[Event], None]: ...

    async def stats(self) -> list[dict[str, Any]]: ...


class ServeReplicas:
    """The engine's deployment, through a handle."""

    def __init__(self, handle: Any) -> None:
        self._handle, self._stream = handle, handle.options(stream=True)

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncGenerator[Any, None]:
        call = self._stream.run.remote(request, ingress, streams)
        try:
            async for item in call:
                yield item
        finally:
            call.cancel()  # of a call that has ended it does nothing

    async def events(self, ingress: str, replica: str) -> AsyncGenerator[list[Event], None]:
        call = self._stream.events.remote(ingress, replica=replica)
        try:
            async for batch in call:
                yield batch
        finally:
            call.cancel()

    async def stats(self) -> list[dict[str, Any]]:
        """Of every replica that answers within a few seconds."""
        found = await self._handle.broadcast("stats").results_async(timeout_s=STATS_SECONDS, return_exceptions=True)
        return [one for one in found if isinstance(one, dict)]


class Answer:
    """What has come of one request and was not taken yet. `next` raises ApiError when there will be no more."""

    def __init__(self, request: Request, *, streams: bool, unread_bytes: int) -> None:
        self.request, self.streams, self._unread_bytes = request, streams, unread_bytes
        self.replica: str | None = None
        self.end: Finished | None = None
        self.written = 0
        """Tokens that came by now, taken or not."""
        self._events: list[Event] = []
        self._unread = 0
        self.error: ApiError | None = None
        self._ready = asyncio.Event()
        self.accepted = asyncio.Event()
        """Set when a replica took the request, or none will."""
        self.closed = asyncio.Event()
        """Set when nothing more will come."""
        self.task: asyncio.Task[None] | None = None

    def put(self, event: Event) -> None:
        if self.closed.is_set():
            return
        if isinstance(event, Finished):
            self.end = event
            self.closed.set()
        else:
            self.written += len(event.tokens)
            self._unread += len(event.text.encode("utf-8")) + 1
        self._events.append(event)
        self._ready.set()
        if self._unread > self._unread_bytes and self.streams:
            self.fail(ApiError(408, "The answer was stopped: nobody reads it.", code="client_too_slow"))
            self.cancel()

    def fail(self, error: ApiError) -> None:
        """Nothing more will come. What was not taken yet is dropped."""
        if not self.closed.is_set():
            self.error = error
        self.closed.set()
        self.accepted.set()
        self._ready.set()

    def cut_off(self) -> Finished:
        """An end for an answer to which none came. Its prompt was read if anything was written."""
        read = len(self.request.prompt) if self.written else 0
        lost = self.error is not None and self.error.status >= 500
        return Finished(self.request.id, "error" if lost else "cancelled", Usage(read, 0, self.written))

    async def next(self) -> list[Event]:
        """Wait for events; all there are, chunks joined. Empty after the last."""
        while not self._events:
            if self.error is not None:
                raise self.error
            if self.end is not None:
                return []
            self._ready.clear()
            await self._ready.wait()
        if self.error is not None:
            raise self.error
        events, self._events, self._unread = merge(self._events), [], 0
        return events

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


class Link:
    """All requests of one ingress."""

    def __init__(self, replicas: Replicas, name: str, unread_bytes: int) -> None:
        self._replicas, self._name, self._unread_bytes = replicas, name, unread_bytes
        self._streaming: dict[str, dict[str, Answer]] = {}
        """Answers in the making, by replica and request."""
        self._asked: dict[str, Answer] = {}
        """Answers that stream and that no replica is known to have taken yet: its word and its first events come by
        calls of their own, and either may be first."""
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def stats(self) -> list[dict[str, Any]]:
        """What every replica counts."""
        return await self._replicas.stats()

    async def start(self, request: Request, *, streams: bool) -> Answer:
        """Returns when a replica took it. Raises ApiError when none does."""
        answer = Answer(request, streams=streams, unread_bytes=self._unread_bytes)
        answer.task = asyncio.create_task(self._follow(answer, streams))
        try:
            await answer.accepted.wait()
        except asyncio.CancelledError:
            answer.cancel()
            raise
        if answer.error is not None:
            raise answer.error
        return answer

    async def _follow(self, answer: Answer, streams: bool) -> None:
        """Live as long as the request does on its replica."""
        call = self._replicas.run(answer.request, self._name, streams)
        if streams:
            self._asked[answer.request.id] = answer
        try:
            async for item in call:
                if isinstance(item, Accepted):
                    answer.replica = item.replica
                    if self._asked.pop(answer.request.id, None) and not answer.closed.is_set():
                        self._streaming.setdefault(item.replica, {})[answer.request.id] = answer
                        self._read(item.replica)
                    answer.accepted.set()
                elif isinstance(item, Refused):
                    answer.fail(of_engine(item.error) if item.error else overloaded(item.retry_after))
                else:
                    for event in item:
                        answer.put(event)
            with contextlib.suppress(TimeoutError):  # the last batch may still be on its way
                await asyncio.wait_for(answer.closed.wait(), LATE_SECONDS)
            answer.fail(replica_lost())
        except asyncio.CancelledError:
            answer.fail(ApiError(499, "The request was cancelled.", code="cancelled"))
            raise
        except Exception as error:  # noqa: BLE001 - Ray's errors have no common root; to a client they are one
            _log_lost(answer, error)
            answer.fail(error if isinstance(error, ApiError) else replica_lost())
        finally:
            self._asked.pop(answer.request.id, None)
            if answer.replica is not None:
                self._streaming.get(answer.replica, {}).pop(answer.request.id, None)
            await call.aclose()

    def _read(self, replica: str) -> None:
        task = self._readers.get(replica)
        if task is None or task.done():
            # In a context of its own: Serve ends the calls that were made in a request's when that request ends.
            nobodys = contextvars.Context()
            self._readers[replica] = asyncio.create_task(self._read_events(replica), context=nobodys)

    async def _read_events(self, replica: str) -> None:
        """Batches of one replica, as long as there are answers in the making."""
        answers = self._streaming.setdefault(replica, {})
        try:
            while answers:
                async for batch in self._replicas.events(self._name, replica):
                    for event in batch:
                        if answer := answers.get(event.id) or self._asked.get(event.id):
                            answer.put(event)
                            if isinstance(event, Finished):
                                answers.pop(event.id, None)
        except (Exception, asyncio.CancelledError) as error:
            for answer in list(answers.values()):
                _log_lost(answer, error)
                answer.fail(replica_lost())
                answer.cancel()
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            if not answers:
                self._streaming.pop(replica, None)
                self._readers.pop(replica, None)


def _log_lost(answer: Answer, error: BaseException) -> None:
    log.warning(
        "request %s lost its replica %s: %s: %s", answer.request.id, answer.replica, type(error).__name__, error
    )


def texts(events: list[Event]) -> tuple[list[Chunk], Finished | None]:
    """(chunks, the end if it is among them)"""
    chunks = [event for event in events if isinstance(event, Chunk)]
    return chunks, next((event for event in events if isinstance(event, Finished)), None)
