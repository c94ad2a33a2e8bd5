"""From the `model` field of a request to an adapter's version: whose names there are, and what they lead to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ftray.errors import ArtefactError, ConfigError, RunError
from ftray.registry.ref import DEFAULT_TENANT, Ref, parse_name
from ftray.registry.store import Registry

from .errors import ApiError, model_not_found
from .tenants import Tenants

log = logging.getLogger("ray.serve")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
LIST_SECONDS = 10.0
"""How long a list of names holds, at least: the registry walks all of a tenant's files for it."""
THREADS = 8
"""That ask the registry, and nothing else: one that stands still keeps these, and no others."""
RESOLVE_SECONDS = 10.0
CALL_SECONDS = 60.0
"""How long the registry may take for a name, and for a list or a change; then it counts as out of reach."""
PATIENCE_SECONDS = 1.0
"""How long a request waits for news of a name of which something is known."""


@dataclass(frozen=True)
class Caller:
    """Who asks. Without keys everybody on this machine is one caller, to whom every tenant's adapters are open."""

    tenant: str
    is_open: bool = False


OPEN = Caller(DEFAULT_TENANT, is_open=True)


class Catalog:
    """Names as one ingress sees them. What the registry says of one holds for `seconds`, and for `outage` seconds more
    while it cannot be reached. For one event loop."""

    def __init__(
        self,
        registry: Registry | None,
        base_name: str,
        tenants: Tenants | None,
        seconds: float,
        outage: float = 0.0,
    ) -> None:
        self.registry, self.base_name, self._tenants = registry, base_name, tenants
        self.error: str | None = None
        """Why the registry could not be reached last; None: it could."""
        self._outage = outage
        self._refs: Recent[tuple[str, str, str | None], Ref | None] = Recent(seconds, outage=outage)
        self._lists: Recent[str | None, list[str]] = Recent(max(seconds, LIST_SECONDS), outage=outage)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="registry")
        self._free = asyncio.Semaphore(THREADS)

    async def choose(self, caller: Caller, model: str) -> Ref | None:
        """The adapter's version, None for the base. `model` is `base` or the base's name, NAME or TENANT/NAME, and
        either with @DIGEST. Raises ApiError 404, the same for what is not there and for what is another's."""
        if model in ("base", self.base_name):
            return None
        place = self._place_of(caller, model)
        ref = await self._refs.get(place, lambda: self._resolve(*place)) if place else None
        if ref is None:
            raise model_not_found(model)
        return ref

    async def names(self, caller: Caller) -> list[str]:
        """What the caller may write in `model`, the base first."""
        if self.registry is None:
            return [self.base_name]
        if caller.is_open:
            prefix = f"{DEFAULT_TENANT}/"
            return [self.base_name, *(name.removeprefix(prefix) for name in await self._names_of(None))]
        own = [name.partition("/")[2] for name in await self._names_of(caller.tenant)]
        shared = [name for name in self._shared(caller) if name in await self._names_of(name.partition("/")[0])]
        return [self.base_name, *own, *shared]

    def forget(self) -> None:
        """Ask the registry again at the next request. What was known no longer counts."""
        self._refs.clear()
        self._lists.clear()

    def refresh(self) -> None:
        """The same, but what was known counts if the registry cannot be reached."""
        self._refs.expire()
        self._lists.expire()

    async def ask(self, call: Callable[..., V], *args: Any, seconds: float = CALL_SECONDS) -> V:
        """Call the registry off the event loop. Raises ApiError 503 when it cannot be reached in time."""
        loop = asyncio.get_running_loop()

        def ended(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have ended first
                loop.call_soon_threadsafe(self._free.release)

        try:
            async with asyncio.timeout(seconds):
                await self._free.acquire()  # so that nothing piles up behind calls that do not return
                calling = self._threads.submit(call, *args)
                calling.add_done_callback(ended)
                found = await asyncio.wrap_future(calling)
        except (OSError, RunError) as error:
            self._told(f"no answer in {seconds:g} s" if isinstance(error, TimeoutError) else str(error))
            raise ApiError(
                503, "The registry cannot be reached.", code="registry_unreachable", retry_after=2
            ) from error
        except ArtefactError:
            self._told(None)
            raise
        self._told(None)
        return found

    def _told(self, error: str | None) -> None:
        if error and not self.error:
            log.error("the registry cannot be reached; what is known of it counts for %g s: %s", self._outage, error)
        elif self.error and not error:
            log.warning("the registry can be reached again")
        self.error = error

    def _place_of(self, caller: Caller, model: str) -> tuple[str, str, str | None] | None:
        """(tenant, name, digest or None) if it is a name, and one that the caller may use."""
        if self.registry is None:
            return None
        try:
            tenant, name, digest = parse_name(model if "/" in model else f"{caller.tenant}/{model}")
        except ConfigError:
            return None
        may = caller.is_open or tenant == caller.tenant or f"{tenant}/{name}" in self._shared(caller)
        return (tenant, name, digest) if may else None

    def _shared(self, caller: Caller) -> list[str]:
        tenant = self._tenants.get(caller.tenant) if self._tenants else None
        return tenant.adapters if tenant else []

    async def _names_of(self, tenant: str | None) -> list[str]:
        """TENANT/NAME of a tenant's adapters, or of all."""

        def read() -> list[str]:
            assert self.registry is not None
            return [entry.full_name for entry in self.registry.entries(tenant) if entry.digest]

        return await self._lists.get(tenant, lambda: self.ask(read))

    async def _resolve(self, tenant: str, name: str, digest: str | None) -> Ref | None:
        assert self.registry is not None
        try:
            return await self.ask(self.registry.resolve, tenant, name, digest, seconds=RESOLVE_SECONDS)
        except ArtefactError:  # not there, or a damaged pointer: to a client it is the same
            return None


@dataclass
class _Kept(Generic[V]):
    """Of one key."""

    future: asyncio.Future[V] | None = None
    at: float = 0.0
    """When it was asked for, and"""
    known: V | None = None
    known_at: float = 0.0
    """what came of it the last time that something did."""


class Recent(Generic[K, V]):
    """Answers that hold for `seconds`; the `most` that were asked for last are kept. Who asks for one that is being
    fetched waits for it. One that cannot be fetched again (ApiError) or takes long counts for `outage` seconds more,
    unless it is None. For one event loop."""

    def __init__(self, seconds: float, most: int = 4096, *, outage: float = 0.0) -> None:
        self._seconds, self._most, self._outage = seconds, most, outage
        self._found: OrderedDict[K, _Kept[V]] = OrderedDict()

    async def get(self, key: K, fetch: Callable[[], Any]) -> V:
        """`fetch()` is awaited unless a fresh answer is there. An error is told to all who waited, and not kept."""
        kept, now = self._found.setdefault(key, _Kept()), time.monotonic()
        self._found.move_to_end(key)
        future = kept.future
        if future is None or (future.done() and now - kept.at >= self._seconds):
            future = kept.future = asyncio.ensure_future(fetch())
            kept.at = now
            future.add_done_callback(lambda done: self._settle(key, kept, done))
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        known = self._known(kept)
        if known is None:
            return await asyncio.shield(future)
        if not future.done():
            await asyncio.wait([future], timeout=max(0.0, kept.at + PATIENCE_SECONDS - now))
        if not future.done() or isinstance(future.exception(), ApiError):
            return known
        return future.result()

    def _known(self, kept: _Kept[V]) -> V | None:
        return kept.known if time.monotonic() - kept.known_at < self._seconds + self._outage else None

    def _settle(self, key: K, kept: _Kept[V], done: asyncio.Future[V]) -> None:
        if done.cancelled() or done.exception() is not None:
            if self._known(kept) is None and self._found.get(key) is kept:
                del self._found[key]
        elif kept.future is done:  # else it was asked for again since
            kept.known, kept.known_at = done.result(), kept.at

    def expire(self) -> None:
        """Fetch each again when it is asked for next."""
        for kept in self._found.values():
            kept.future = None

    def clear(self) -> None:
        self._found.clear()
