"""One engine replica: a base, its engine, and the thread that steps it.

A request has a call of its own (`run`), which lasts as long as the request: so Ray Serve counts it, routes it, cancels
it and waits for it when the replica drains. What streams, however, travels in batches: one call (`events`) for each
ingress carries what one step made for all its requests, because a message of Ray's costs half a millisecond of CPU on
either side, and a step may make one piece of text for each of 32 answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ftray.data.remote import cache_folder
from ftray.data.tokenizer import chat_template_hash, load_tokenizer
from ftray.engine.engine import Engine, load_base
from ftray.engine.request import Chunk, Event, Finished, Request, Usage
from ftray.errors import ArtefactError, QueueFull, RequestError, RunError
from ftray.manifest import digest_of
from ftray.model.served import Adapter, Base
from ftray.model.source import find_shapes
from ftray.registry.base import BaseFacts
from ftray.registry.cache import Cache
from ftray.registry.ref import Ref
from ftray.registry.store import Registry
from ftray.session import usable_cpus

from .config import ServeConfig
from .metrics import MOST_SERIES
from .wire import Accepted, Refused, Reply, join, merge

log = logging.getLogger("ray.serve")
IDLE_SECONDS = 1.0
"""An `events` call ends when its ingress has had no request here for so long: an open call would hold up draining."""
TELL_SECONDS = 1.0
"""An answer that does not stream is told in parts too: who leaves before its end has had them written."""
MOST_EVENTS = 50_000
"""What waits for an ingress, at most; one that takes nothing has ended."""


@dataclass
class _Outbox:
    """What waits for one ingress."""

    events: list[Event] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    running: set[str] = field(default_factory=set)
    """Its requests whose events go through here."""
    reader: int = 0
    """Number of the `events` call that reads: a later one takes over."""

    def put(self, event: Event) -> None:
        self.events.append(event)
        self.ready.set()

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        self.ready.clear()
        return merge(events)


@dataclass
class _Running:
    """One request here."""

    done: asyncio.Event = field(default_factory=asyncio.Event)
    outbox: _Outbox | None = None
    """None: it does not stream; its chunks are kept until they are told."""
    chunks: list[Chunk] = field(default_factory=list)
    end: Finished | None = None

    def take(self) -> list[Event]:
        """What does not go through an outbox."""
        if self.outbox is not None:
            return []
        chunks, self.chunks = self.chunks, []
        return [*([join(chunks)] if chunks else []), *([self.end] if self.end else [])]


class Bridge:
    """Between an engine's thread and an event loop: every event reaches whom it is for. Needs no Ray."""

    def __init__(self, make: Callable[[], Engine], name: str) -> None:
        """`make` is called on the engine's thread, which alone computes (see `ftray.model.threads`)."""
        self.name = name
        self.broken: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[str, _Running] = {}
        self._outboxes: dict[str, _Outbox] = {}
        self._stop = threading.Event()
        made: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._step, args=(make, made), name="engine", daemon=True)
        self._thread.start()
        self.engine = made.result()

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncIterator[Reply]:
        """Answer one request. Yields Accepted or Refused; then, if it does not stream, its events, now and then. Who
        stops listening cancels it."""
        self._loop = asyncio.get_running_loop()
        if self.broken or self._stop.is_set():
            yield Refused(RunError("this replica is ending"))
            return
        running = _Running(outbox=self._outboxes.setdefault(ingress, _Outbox()) if streams else None)
        self._running[request.id] = running
        if running.outbox:
            running.outbox.running.add(request.id)
        try:
            try:
                await self._add(request)
            except QueueFull:
                running.done.set()
                yield Refused(None)
                return
            except RequestError as error:
                running.done.set()
                yield Refused(error)
                return
            yield Accepted(self.name)
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(running.done.wait(), None if streams else TELL_SECONDS)
                ended = running.done.is_set()
                if told := running.take():
                    yield told
                if ended:
                    break
        finally:
            if not running.done.is_set():
                self.engine.cancel(request.id)
            if running.outbox:
                running.outbox.running.discard(request.id)
            self._running.pop(request.id, None)

    async def _add(self, request: Request) -> None:
        """A grammar may take half a second to compile: not on the event loop, where all other answers wait for it."""
        if request.sampling.grammar is None:
            self.engine.add(request)
            return
        adding = asyncio.ensure_future(asyncio.to_thread(self.engine.add, request))
        try:
            await asyncio.shield(adding)
        except asyncio.CancelledError:
            adding.add_done_callback(lambda _: self.engine.cancel(request.id))
            raise

    async def events(self, ingress: str) -> AsyncIterator[list[Event]]:
        """Batches of what this ingress's streaming requests made, until it has had none for a while."""
        outbox = self._outboxes.setdefault(ingress, _Outbox())
        outbox.reader += 1
        number = outbox.reader
        while True:
            try:
                await asyncio.wait_for(outbox.ready.wait(), IDLE_SECONDS)
            except TimeoutError:
                if not outbox.running:
                    if outbox.reader == number and self._outboxes.get(ingress) is outbox:
                        del self._outboxes[ingress]  # after an overflow another one has the name
                    return
                continue
            if outbox.reader != number:
                return
            if batch := outbox.take():
                yield batch

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self.engine.close()

    def _step(self, make: Callable[[], Engine], made: Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:  # noqa: BLE001 - raised again where the bridge is made
            made.set_exception(error)
            return
        made.set_result(engine)
        try:
            while not self._stop.is_set():
                if engine.wait(0.2) and (events := engine.step()):
                    assert self._loop is not None
                    self._loop.call_soon_threadsafe(self._deliver, events)
        except BaseException as error:
            log.exception("the engine's thread ended")
            self.broken = error
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._fail_all)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            running = self._running.get(event.id)
            if running is None:  # nobody listens any more
                continue
            if isinstance(event, Finished):
                running.end = event
                running.done.set()
            if running.outbox:
                running.outbox.put(event)
            elif isinstance(event, Chunk):
                running.chunks.append(event)
        for name, outbox in list(self._outboxes.items()):
            if len(outbox.events) > MOST_EVENTS:
                log.error("ingress %s takes nothing: its %d requests are cancelled", name, len(outbox.running))
                for id in outbox.running:
                    self.engine.cancel(id)
                del self._outboxes[name]

    def _fail_all(self) -> None:
        error = RunError("the engine ended")
        self._deliver([Finished(id, "error", Usage(0, 0, 0), error) for id in list(self._running)])


class EngineReplica:
    """The deployment. `config` is `ServeConfig.dump()`."""

    def __init__(self, config: dict[str, Any]) -> None:
        from ray import serve

        self.config = ServeConfig.model_validate(config)
        self._bridge = Bridge(self._make, serve.get_replica_context().replica_id.unique_id)
        self._engine = self._bridge.engine

    def _make(self) -> Engine:
        base = make_base(self.config)
        self._shelf = Shelf(self.config, base)
        return Engine(base, self._shelf.load, self.config.engine)

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncIterator[Any]:
        """See `Bridge.run`."""
        async for item in self._bridge.run(request, ingress, streams):
            yield item

    async def events(self, ingress: str, replica: str) -> AsyncIterator[list[Event]]:
        """See `Bridge.events`. `replica` is this one's name: the router reads it."""
        if replica != self._bridge.name:
            raise RunError(f"replica {replica} is gone")
        async for batch in self._bridge.events(ingress):
            yield batch

    async def stats(self) -> dict[str, Any]:
        """What the engine counts, for metrics and admin calls."""
        stats = self._engine.stats()
        counted = {field.name: getattr(stats, field.name) for field in fields(stats)}
        counted |= {"context": self._engine.context, "adapters": len(stats.resident)}
        return {"replica": self._bridge.name, **counted, **self._shelf.counted()}

    def record_routing_stats(self) -> dict[str, Any]:
        """For the router: whose adapters are here."""
        return {"resident": [ref.digest for ref in self._engine.stats().resident]}

    def check_health(self) -> None:
        if self._bridge.broken:
            raise RuntimeError("the engine's thread ended") from self._bridge.broken

    def __del__(self) -> None:
        if bridge := getattr(self, "_bridge", None):
            bridge.close()


@dataclass
class _Tally:
    """Of one adapter."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0
    """Times that it left memory: each is counted when its last reference goes, not when somebody looks."""
    load_seconds: float = 0.0


class Shelf:
    """Reads adapters for an engine, registry to disk to memory, and counts that by adapter."""

    def __init__(self, config: ServeConfig, base: Base) -> None:
        self._base = base
        self._cache: Cache | None = None
        if config.registry is not None:
            template = chat_template_hash(load_tokenizer(config.model, config.chat_template)) or ""
            facts = BaseFacts(config.model.path, find_shapes(config.model)[0], base.digest, template)
            whole = config.cache.folder or cache_folder() / "adapters"
            own = digest_of([base.digest, template])[:16]  # what lies there was checked against this base
            self._cache = Cache(Path(whole) / own, config.cache.max_bytes, Registry(config.registry), facts)
        self._lock = threading.Lock()
        self._tallies: OrderedDict[tuple[str, str], _Tally] = OrderedDict()
        """By (tenant, digest), the latest last."""
        self._gone: deque[Ref] = deque()
        """Adapters that left memory and are not counted yet. Without the lock, which whoever let the last reference go
        may hold."""

    def load(self, ref: Ref) -> Adapter:
        """For the engine's threads. Raises ArtefactError."""
        began, adapter = time.monotonic(), None
        try:
            if self._cache is None:
                raise ArtefactError("this endpoint has no registry", where=str(ref))
            with self._cache.get(ref) as folder:
                adapter = self._base.read(folder)
            weakref.finalize(adapter, self._gone.append, ref).atexit = False
            return adapter
        finally:
            with self._lock:
                tally = self._tally(ref)
                tally.loads += adapter is not None
                tally.failures += adapter is None
                tally.load_seconds += time.monotonic() - began

    def counted(self) -> dict[str, Any]:
        """Loads, failures, evictions and seconds by (tenant, digest)."""
        with self._lock:
            while self._gone:
                ref = self._gone.popleft()
                if tally := self._tallies.get((ref.tenant, ref.digest)):
                    tally.evictions += 1
            return {
                what.name: {who: getattr(tally, what.name) for who, tally in self._tallies.items()}
                for what in fields(_Tally)
            }

    def _tally(self, ref: Ref) -> _Tally:
        """As many are kept as series of an ingress; the one that was loaded longest ago is forgotten."""
        found = self._tallies.setdefault((ref.tenant, ref.digest), _Tally())
        self._tallies.move_to_end((ref.tenant, ref.digest))
        while len(self._tallies) > MOST_SERIES:
            self._tallies.popitem(last=False)
        return found


def make_base(config: ServeConfig) -> Base:
    """The base of a replica, on its GPU if it has one. Raises ModelError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":  # Ray sets one thread for each CPU that it reserves
        torch.set_num_threads(config.replicas.threads or max(1, usable_cpus() // config.replicas.max))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
    return load_base(config.model, quantized=config.quantization == "nf4", dtype=dtype, device=device)
