"""Adapters on the move: read into the host's memory off the decoding thread, and from there onto the device.

Two bounded tiers, each least recently used first out, and neither gives up what a request uses. Tenants take turns in
what is read. All methods belong to the engine's thread; reading alone runs elsewhere.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftray.errors import ArtefactError, FtrayError
from ftray.model.pooled import PooledModel
from ftray.model.served import Adapter
from ftray.model.threads import use_one
from ftray.registry.ref import Ref

FORGIVEN_AFTER = 5.0
"""Seconds for which an adapter that could not be read is not tried again."""


@dataclass(eq=False)
class Held:
    """An adapter that is to be read, is in memory, or could not be read. Identity matters, not value."""

    ref: Ref
    adapter: Adapter | None = None
    error: FtrayError | None = None
    users: int = 0
    """Requests that wait for it or run on it."""
    running: int = 0
    """Of these, those that need it on the device."""
    begun: bool = False
    """Its reading has begun."""
    on_device: bool = False
    since: int = 0
    """Those that came onto the device earlier have smaller numbers."""
    used: float = 0.0
    """Last wanted or left, and"""
    failed: float = 0.0
    """when it failed, by the monotonic clock."""
    nbytes: int = 0

    @property
    def settled(self) -> bool:
        return self.adapter is not None or self.error is not None


class Unread:
    """Adapters that wait to be read: those of a tenant in the order in which he asked, tenants in turn. One that
    several wait for stands in the queue of each."""

    def __init__(self) -> None:
        self._of: dict[str, dict[Held, None]] = {}
        """By tenant, the one whose turn it is first; none without an adapter."""

    def push(self, tenant: str, held: Held) -> None:
        self._of.setdefault(tenant, {})[held] = None

    def pop(self) -> Held | None:
        if not self._of:
            return None
        tenant = next(iter(self._of))
        queue = self._of[tenant] = self._of.pop(tenant)  # his next turn comes after all others'
        held = next(iter(queue))
        self.remove(held)
        return held

    def remove(self, held: Held) -> None:
        for queue in self._of.values():
            queue.pop(held, None)
        self._of = {tenant: queue for tenant, queue in self._of.items() if queue}


class Adapters:
    def __init__(
        self,
        pooled: PooledModel,
        load: Callable[[Ref], Adapter],
        *,
        on_device: int,
        memory: int,
        threads: int,
        wake: Callable[[], None],
    ) -> None:
        """`load` reads one, in a thread of its own, and may raise FtrayError. `wake` is called when one has ended."""
        self._pooled, self._load, self._wake = pooled, load, wake
        self._most, self._memory = on_device, memory
        self._held: dict[str, Held] = {}
        self._broken: dict[str, Held] = {}
        """Those of them that could not be read."""
        self._leaving: Held | None = None
        """One that gets no more requests until its place is free, because a request before them lacks a place."""
        self._numbers = itertools.count()
        self._count, self._readers = threads, 0
        """Threads that may read, and those that do."""
        self._unread = Unread()
        self._lock = threading.Lock()
        """Of `_readers`, `_unread`, `_ended` and what has begun."""
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter", initializer=use_one)
        self._ended: list[tuple[Held, Adapter | FtrayError]] = []
        self._closing = threading.Event()
        self.memory = 0
        """Bytes in the host's memory."""
        self.loads = self.failures = self.evictions = 0

    def want(self, ref: Ref, tenant: str) -> Held:
        """One more request, of `tenant`, is for this adapter. It is read unless it was before, when it is its turn."""
        self._forgive()
        held = self._held.get(ref.digest)
        if held is None:
            held = self._held[ref.digest] = Held(ref)
        held.users += 1
        held.used = time.monotonic()
        with self._lock:
            if not held.begun:
                self._unread.push(tenant, held)
                if self._readers < self._count:
                    self._readers += 1
                    self._threads.submit(self._read_all)
        return held

    def leave(self, held: Held) -> None:
        """A request that wanted it has ended, or no longer waits. What nobody waits for any more is not read."""
        held.users -= 1
        held.used = time.monotonic()
        with self._lock:
            unwanted = not held.users and not held.begun
            if unwanted:
                self._unread.remove(held)
        if unwanted:
            del self._held[held.ref.digest]
        self._shrink()

    def start(self, held: Held) -> bool:
        """Bring an adapter that was read onto the device for one more running request. False: there is no room now, or
        it failed, which `error` tells.

        Requests are tried in the order in which they should run. The first one for which there is no room makes the
        adapter that is there for longest leave: it gets no more requests, so that its place becomes free."""
        if held.adapter is None or held is self._leaving:
            return False
        if not held.on_device:
            resident = [h for h in self._held.values() if h.on_device]
            if len(resident) >= self._most:
                idle = [h for h in resident if not h.running]
                if not idle:
                    self._leaving = self._leaving or min(resident, key=lambda h: h.since)
                    return False
                self._off(min(idle, key=lambda h: h.used))
            try:
                self._pooled.put(held.ref.digest, held.adapter.deltas, held.adapter.bottlenecks)
            except Exception as error:  # noqa: BLE001  no room on the device, or an adapter that the base cannot hold
                self._pooled.drop(held.ref.digest)
                self._break(held, _unusable(held, "cannot be put onto the device", error))
                self._wake()
                return False
            held.on_device, held.since = True, next(self._numbers)
        held.running += 1
        return True

    def stop(self, held: Held) -> None:
        """A running request has ended. The adapter stays on the device while there is room."""
        held.running -= 1

    def collect(self) -> None:
        """Take in what has been read since. Who lacks a place from now on says so anew."""
        self._leaving = None
        with self._lock:
            ended, self._ended = self._ended, []
        for held, result in ended:
            if isinstance(result, Adapter):
                held.adapter, held.nbytes = result, result.nbytes
                self.memory += held.nbytes
                self.loads += 1
            else:
                self._break(held, result)
        self._forgive()
        self._shrink()

    def resident(self) -> list[Ref]:
        """Those in memory, last used first."""
        ready = [held for held in self._held.values() if held.adapter]
        return [held.ref for held in sorted(ready, key=lambda held: -held.used)]

    @property
    def users(self) -> int:
        return sum(held.users for held in self._held.values())

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=True)
        for held in self._held.values():
            if held.on_device:
                self._off(held)

    def _read_all(self) -> None:
        """Read one after the other until none is left."""
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        with self._lock:
            held = None if self._closing.is_set() else self._unread.pop()
            if held is None:
                self._readers -= 1
                return False
            held.begun = True
        result = self._read(held)
        with self._lock:  # whoever takes it in finds the caller woken, and the adapter held by nobody else
            self._ended.append((held, result))
            del held, result
            if not self._closing.is_set():
                self._wake()
        return True

    def _read(self, held: Held) -> Adapter | FtrayError:
        try:
            return self._load(held.ref)
        except FtrayError as error:
            return error
        except Exception as error:  # noqa: BLE001  whatever an adapter does costs its own requests alone
            return _unusable(held, "cannot be read", error)

    def _break(self, held: Held, error: FtrayError) -> None:
        """It cannot be used: who waits for it, and who asks for it in the next seconds, gets the error."""
        self.memory -= held.nbytes
        held.adapter, held.nbytes, held.error, held.failed = None, 0, error, time.monotonic()
        self._broken[held.ref.digest] = held
        self.failures += 1

    def _forgive(self) -> None:
        """Forget failures that are old, so that these adapters are tried again."""
        now, broken = time.monotonic(), self._broken.items()
        for digest in [d for d, held in broken if not held.users and now - held.failed > FORGIVEN_AFTER]:
            del self._broken[digest], self._held[digest]

    def _shrink(self) -> None:
        """Let go of what nobody uses until the memory bound holds."""
        if self.memory <= self._memory:
            return
        idle = [held for held in self._held.values() if held.adapter and not held.users]
        for held in sorted(idle, key=lambda held: held.used):
            if self.memory <= self._memory:
                break
            self.memory -= held.nbytes
            if held.on_device:
                self._off(held)
            del self._held[held.ref.digest]
            self.evictions += 1

    def _off(self, held: Held) -> None:
        self._pooled.drop(held.ref.digest)
        held.on_device = False
        if held is self._leaving:
            self._leaving = None


def _unusable(held: Held, what: str, error: Exception) -> ArtefactError:
    wrapped = ArtefactError(f"{what}: {type(error).__name__}: {error}", where=str(held.ref))
    wrapped.__cause__ = error
    return wrapped
