"""Adapters on the move: read into the host's memory off the decoding thread, and from there onto the device.

Two bounded tiers, each least recently used first out, and neither gives up what a request uses. All methods belong to
the engine's thread; reading alone runs elsewhere.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftray.errors import ArtefactError, FtrayError
from ftray.model.pooled import PooledModel
from ftray.model.served import Adapter
from ftray.registry.ref import Ref

FORGIVEN_AFTER = 5.0
"""Seconds for which an adapter that could not be read is not tried again."""


@dataclass
class Held:
    """An adapter that is being read, is in memory, or could not be read. Identity matters, not value."""

    ref: Ref
    adapter: Adapter | None = None
    error: FtrayError | None = None
    users: int = 0
    """Requests that wait for it or run on it."""
    running: int = 0
    """Of these, those that need it on the device."""
    on_device: bool = False
    used: float = 0.0

    @property
    def settled(self) -> bool:
        return self.adapter is not None or self.error is not None


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
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="adapter")
        self._ended: deque[tuple[Held, Adapter | FtrayError]] = deque()
        self._closing = threading.Event()
        self.loads = self.failures = self.evictions = 0

    def want(self, ref: Ref) -> Held:
        """One more request is for this adapter. Reading begins if nobody wanted it before."""
        held = self._held.get(ref.digest)
        if held and held.error and not held.users and time.monotonic() - held.used > FORGIVEN_AFTER:
            held = None
        if held is None:
            held = self._held[ref.digest] = Held(ref)
            self._threads.submit(self._read, held)
        held.users += 1
        held.used = time.monotonic()
        return held

    def leave(self, held: Held) -> None:
        """A request that wanted it has ended, or no longer waits."""
        held.users -= 1
        held.used = time.monotonic()
        self._shrink()

    def start(self, held: Held) -> bool:
        """Bring a settled adapter onto the device for one more running request. False: there is no room now."""
        assert held.adapter is not None
        if not held.on_device:
            resident = [h for h in self._held.values() if h.on_device]
            if len(resident) >= self._most:
                idle = [h for h in resident if not h.running]
                if not idle:
                    return False
                self._off(min(idle, key=lambda h: h.used))
            self._pooled.put(held.ref.digest, held.adapter.deltas, held.adapter.bottlenecks)
            held.on_device = True
        held.running += 1
        return True

    def stop(self, held: Held) -> None:
        """A running request has ended. The adapter stays on the device while there is room."""
        held.running -= 1

    def collect(self) -> None:
        """Take in what has been read since."""
        while self._ended:
            held, result = self._ended.popleft()
            if isinstance(result, Adapter):
                held.adapter = result
                self.loads += 1
            else:
                held.error = result
                self.failures += 1
        self._shrink()

    def resident(self) -> list[Ref]:
        """Those in memory, last used first."""
        ready = [held for held in self._held.values() if held.adapter]
        return [held.ref for held in sorted(ready, key=lambda held: -held.used)]

    @property
    def users(self) -> int:
        return sum(held.users for held in self._held.values())

    @property
    def memory(self) -> int:
        """Bytes in the host's memory."""
        return sum(held.adapter.nbytes for held in self._held.values() if held.adapter)

    def close(self) -> None:
        self._closing.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for held in self._held.values():
            if held.on_device:
                self._off(held)

    def _read(self, held: Held) -> None:
        result: Adapter | FtrayError
        try:
            result = self._load(held.ref)
        except FtrayError as error:
            result = error
        except Exception as error:  # noqa: BLE001  whatever an adapter does costs its own requests alone
            result = ArtefactError(f"cannot be read: {type(error).__name__}: {error}", where=str(held.ref))
            result.__cause__ = error
        self._ended.append((held, result))
        if not self._closing.is_set():
            self._wake()

    def _shrink(self) -> None:
        """Let go of what nobody uses until the memory bound holds, and of errors that nobody waits for."""
        now = time.monotonic()
        for digest, held in list(self._held.items()):
            if held.error and not held.users and now - held.used > FORGIVEN_AFTER:
                del self._held[digest]
        size = self.memory
        if size <= self._memory:
            return
        idle = [held for held in self._held.values() if held.adapter and not held.users]
        for held in sorted(idle, key=lambda held: held.used):
            if size <= self._memory:
                break
            assert held.adapter is not None
            size -= held.adapter.nbytes
            if held.on_device:
                self._off(held)
            del self._held[held.ref.digest]
            self.evictions += 1

    def _off(self, held: Held) -> None:
        self._pooled.drop(held.ref.digest)
        held.on_device = False
