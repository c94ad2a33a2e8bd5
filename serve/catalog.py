"""From the `model` field of a request to an adapter's version: whose names there are, and what they lead to."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ftray.errors import ArtefactError, ConfigError, RunError
from ftray.registry.ref import DEFAULT_TENANT, Ref, parse_name
from ftray.registry.store import Registry

from .errors import ApiError, model_not_found
from .tenants import Tenants

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
LIST_SECONDS = 10.0
"""How long a list of names holds, at least: the registry walks all of a tenant's files for it."""


@dataclass(frozen=True)
class Caller:
    """Who asks. Without keys everybody on this machine is one caller, to whom every tenant's adapters are open."""

    tenant: str
    is_open: bool = False


OPEN = Caller(DEFAULT_TENANT, is_open=True)


class Catalog:
    """Names as one ingress sees them. What the registry says of one holds for `seconds`."""

    def __init__(self, registry: Registry | None, base_name: str, tenants: Tenants | None, seconds: float) -> None:
        self.registry, self.base_name, self._tenants = registry, base_name, tenants
        self._refs: Recent[tuple[str, str, str | None], Ref | None] = Recent(seconds)
        self._lists: Recent[str | None, list[str]] = Recent(max(seconds, LIST_SECONDS))

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
        """Ask the registry again at the next request."""
        self._refs.clear()
        self._lists.clear()

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

        return await self._lists.get(tenant, lambda: ask(read))

    async def _resolve(self, tenant: str, name: str, digest: str | None) -> Ref | None:
        assert self.registry is not None
        try:
            return await ask(self.registry.resolve, tenant, name, digest)
        except ArtefactError:  # not there, or a damaged pointer: to a client it is the same
            return None


async def ask(call: Callable[..., V], *args: Any) -> V:
    """Call the registry off the event loop. Raises ApiError 503 when it cannot be reached."""
    try:
        return await asyncio.to_thread(call, *args)
    except (OSError, RunError) as error:
        raise ApiError(503, "The registry cannot be reached.", code="registry_unreachable", retry_after=2) from error


class Recent(Generic[K, V]):
    """Answers that hold for `seconds`; the `most` that were asked for last are kept. Who asks for one that is being
    fetched waits for it. For one event loop."""

    def __init__(self, seconds: float, most: int = 4096) -> None:
        self._seconds, self._most = seconds, most
        self._found: OrderedDict[K, tuple[float, asyncio.Future[V]]] = OrderedDict()

    async def get(self, key: K, fetch: Callable[[], Any]) -> V:
        """`fetch()` is awaited unless a fresh answer is there. An error is told to all who waited, and not kept."""
        at, future = self._found.get(key, (0.0, None))
        if future is None or (future.done() and time.monotonic() - at >= self._seconds):
            future = asyncio.ensure_future(fetch())
            self._found[key] = (time.monotonic(), future)
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        try:
            return await asyncio.shield(future)
        except Exception:
            if self._found.get(key, (0.0, None))[1] is future:
                del self._found[key]
            raise

    def clear(self) -> None:
        self._found.clear()
