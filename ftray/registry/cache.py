"""Adapters on the local disk: fetched from the registry, checked, kept as long as there is room.

    with cache.get(ref) as folder:
        …                               # nobody removes the folder before this ends

Threads and processes of a machine share one folder:

    CACHE/DIGEST/…               a checked adapter; its time of change is when it was last used
    CACHE/.DIGEST.BYTES.part/    one that is being fetched, and the room that it will take
    CACHE/.locks/DIGEST          locked shared by whoever uses it, alone by whoever fetches or removes it
    CACHE/.locks/room            locked alone by whoever makes room

Locks are the kernel's (flock) and end with their process, so after kill -9 nothing is in use that is not, and what was
fetched half is swept by the next who needs its room.
"""

from __future__ import annotations

import copy
import fcntl
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ftray.errors import ArtefactError, FtrayError, RunError, UnknownAdapter
from ftray.registry.base import BaseFacts
from ftray.registry.check import Limits, check, fits_base, refuse_files
from ftray.registry.facts import FACTS
from ftray.registry.ref import Ref, is_digest
from ftray.registry.store import Registry

_PART = re.compile(r"\.([0-9a-f]{64})\.(\d+)\.part")
_ROOM = "room"
_POLL_SECONDS = 0.05
_REMEMBERED = 1024
"""Refused adapters that are remembered."""


@dataclass(frozen=True)
class Kept:
    """An adapter on the disk."""

    digest: str
    size: int
    """Bytes."""
    used_ns: int
    """When it was last used."""


def to_evict(kept: Sequence[Kept], need: int, limit: int) -> list[str]:
    """Digests to remove, the longest unused first, until `need` more bytes stay within `limit`; all of them where that
    is not enough."""
    used, gone = sum(each.size for each in kept), []
    for each in sorted(kept, key=lambda each: (each.used_ns, each.digest)):
        if used + need <= limit:
            break
        gone.append(each.digest)
        used -= each.size
    return gone


class Cache:
    """Checked adapters of a registry in a local folder, of at most `limit_bytes`. Safe for threads and processes, which
    must agree on the base: what is kept was checked against it."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        limit_bytes: int,
        registry: Registry | str,
        base: BaseFacts,
        limits: Limits | None = None,
        *,
        patience_seconds: float = 60.0,
        remember_seconds: float = 30.0,
    ) -> None:
        """`patience_seconds`: how long to wait for room while everything here is in use. `remember_seconds`: how long
        an adapter that was refused is not fetched again."""
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.registry = Registry(registry) if isinstance(registry, str) else registry
        self.base, self.limits = base, limits or Limits()
        self.patience_seconds, self.remember_seconds = patience_seconds, remember_seconds
        self.fetched = self.evicted = 0
        self._mutex = threading.Lock()
        self._fetching: dict[str, Future[None]] = {}
        self._refused: OrderedDict[str, tuple[float, FtrayError]] = OrderedDict()
        self._trusted: dict[str, tuple[object, ...]] = {}
        """What the files looked like when this process checked them."""
        (self.folder / ".locks").mkdir(parents=True, exist_ok=True)

    @contextmanager
    def get(self, ref: Ref) -> Iterator[Path]:
        """The local folder of a checked adapter, which stays until the context ends. Whoever asks while it is fetched
        waits for that. Raises ArtefactError for an adapter that is refused, UnknownAdapter for one that is gone,
        RunError when the registry cannot be reached or there is no room."""
        assert is_digest(ref.digest), ref.digest
        while True:
            self._join(ref.digest)
            with self._lock(ref.digest, fcntl.LOCK_SH):
                if self._is_good(ref):
                    self._use(ref.digest)
                    yield self.folder / ref.digest
                    self._use(ref.digest)
                    return
            self._fetch_once(ref)

    # -------------------------------------------------------------------------------------------------------- fetching

    def _join(self, digest: str) -> None:
        """Wait for the fetch that this process is at, if it is, and raise what it ended with. An adapter that was
        refused a moment ago is refused again."""
        with self._mutex:
            refused, going_on = self._remembered(digest), self._fetching.get(digest)
        if refused:
            raise refused
        if going_on and (error := going_on.exception()):
            raise copy.copy(error)

    def _fetch_once(self, ref: Ref) -> None:
        """Fetch what is missing or damaged; one fetch of a digest at a time in this process."""
        with self._mutex:
            if ref.digest in self._fetching or self._remembered(ref.digest):
                return  # somebody was quicker: `_join` waits for them, or tells what they found
            future: Future[None] = Future()
            self._fetching[ref.digest] = future
        try:
            with self._lock(ref.digest, fcntl.LOCK_EX):
                if not self._is_good(ref):  # another process may have been first
                    self._fetch(ref)
        except BaseException as error:
            self._remember(ref.digest, error)
            future.set_exception(error)
            raise
        else:
            future.set_result(None)
        finally:
            with self._mutex:
                del self._fetching[ref.digest]

    def _fetch(self, ref: Ref) -> None:
        """Fetch and check; the lock of the digest is held alone."""
        where = str(ref)
        try:
            facts, content = self.registry.facts(ref, self.limits.text_bytes)
        except UnknownAdapter:
            self._forget_lock(ref.digest)  # or names that were made up would leave one each
            raise
        fits_base(facts, self.base, where)
        sizes = {name: file.size for name, file in facts.files.items()} | {FACTS: len(content)}
        refuse_files(sizes, self.limits, where)
        size = sum(sizes.values())
        shutil.rmtree(self.folder / ref.digest, ignore_errors=True)
        part = self._reserve(ref, size)
        try:
            (part / FACTS).write_bytes(content)
            for name, file in facts.files.items():
                self.registry.download(ref, name, file.size, part / name)
            check(part, self.base, self.limits, digest=ref.digest, where=where)
            with self._lock(_ROOM, fcntl.LOCK_EX):  # who counts meanwhile would see it twice, or not at all
                os.replace(part, self.folder / ref.digest)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        self._trusted[ref.digest] = self._look(ref.digest)
        with self._mutex:
            self.fetched += 1

    def _is_good(self, ref: Ref) -> bool:
        """Whether the copy is there and whole: checked fully when this process first sees it, and when its files have
        changed since. Some lock of the digest is held."""
        looks = self._look(ref.digest)
        if not looks:
            self._trusted.pop(ref.digest, None)
            return False
        if self._trusted.get(ref.digest) == looks:
            return True
        try:
            check(self.folder / ref.digest, self.base, self.limits, digest=ref.digest, where=str(ref))
        except (ArtefactError, FileNotFoundError):
            return False  # it is fetched again; what is wrong with the registry's own is told then
        self._trusted[ref.digest] = looks
        return True

    def _look(self, digest: str) -> tuple[object, ...]:
        """Names, sizes, times and inodes of the files; empty where there is no copy."""
        try:
            entries = sorted(os.scandir(self.folder / digest), key=lambda entry: entry.name)
            stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            return ()
        return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino, s.st_mode) for name, s in stats)

    def _remembered(self, digest: str) -> FtrayError | None:
        when, error = self._refused.get(digest, (0.0, None))
        if error is None or time.monotonic() - when > self.remember_seconds:
            self._refused.pop(digest, None)
            return None
        return copy.copy(error)

    def _remember(self, digest: str, error: BaseException) -> None:
        """That an adapter was refused: nothing about it changes soon. What is gone, or out of reach, may come back."""
        if not isinstance(error, ArtefactError) or isinstance(error, UnknownAdapter):
            return
        with self._mutex:
            self._refused[digest] = (time.monotonic(), error)
            while len(self._refused) > _REMEMBERED:
                self._refused.popitem(last=False)

    # ------------------------------------------------------------------------------------------------------------ room

    def _reserve(self, ref: Ref, size: int) -> Path:
        """An empty folder for what is fetched, once there is room for `size` bytes."""
        if size > self.limit_bytes:
            raise ArtefactError(
                f"{size:,} bytes, and the cache on the disk may hold {self.limit_bytes:,}", where=str(ref)
            )
        part = self.folder / f".{ref.digest}.{size}.part"
        deadline = time.monotonic() + self.patience_seconds
        while True:
            with self._lock(_ROOM, fcntl.LOCK_EX):
                shutil.rmtree(part, ignore_errors=True)  # our own, of an earlier process
                if self._make_room(size, ref.digest):
                    part.mkdir()
                    return part
            if time.monotonic() > deadline:
                raise RunError(
                    f"no room for {size:,} bytes: all that the cache of {self.limit_bytes:,} bytes holds is in use",
                    where=str(ref),
                    hint="enlarge the cache on the disk",
                )
            time.sleep(_POLL_SECONDS)

    def _make_room(self, need: int, digest: str) -> bool:
        """Remove what is longest unused, and litter, until there is room; False if what is in use leaves none. The
        lock of room is held, so nobody else reserves."""
        kept, reserved = self._count(sweep=digest)
        while gone := to_evict(kept, need + reserved, self.limit_bytes):
            if self._evict(gone[0]):
                kept = [each for each in kept if each.digest != gone[0]]
                continue
            reserved += sum(each.size for each in kept if each.digest == gone[0])  # in use: it stays, and counts
            kept = [each for each in kept if each.digest != gone[0]]
        return sum(each.size for each in kept) + reserved + need <= self.limit_bytes

    def usage(self) -> tuple[list[Kept], int]:
        """(adapters on the disk, bytes reserved by those being fetched)."""
        with self._lock(_ROOM, fcntl.LOCK_EX):
            return self._count()

    def _count(self, sweep: str | None = None) -> tuple[list[Kept], int]:
        """What `usage` tells; the lock of room is held. `sweep`: remove what dead processes left of others than this
        digest."""
        kept, reserved = [], 0
        for entry in os.scandir(self.folder):
            if is_digest(entry.name):
                try:
                    sizes = [file.stat(follow_symlinks=False).st_size for file in os.scandir(entry.path)]
                    kept.append(Kept(entry.name, sum(sizes), entry.stat().st_mtime_ns))
                except FileNotFoundError:
                    continue  # it was removed while we looked
            elif match := _PART.fullmatch(entry.name):
                if sweep is not None and match[1] != sweep and self._sweep(entry.path, match[1]):
                    continue
                reserved += int(match[2])
        return kept, reserved

    def _sweep(self, part: str, digest: str) -> bool:
        """Remove a folder of a fetch that nobody is at any more."""
        with self._try_lock(digest) as locked:
            if locked:
                shutil.rmtree(part, ignore_errors=True)
            return locked

    def _evict(self, digest: str) -> bool:
        """Remove an adapter unless it is in use."""
        with self._try_lock(digest) as locked:
            if locked:
                gone = self.folder / f".{digest}.0.part"  # renamed first: killed here, it is litter and no half adapter
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(self.folder / digest, gone)
                shutil.rmtree(gone)
                self._forget_lock(digest)
                self._trusted.pop(digest, None)
                with self._mutex:
                    self.evicted += 1
            return locked

    def _forget_lock(self, digest: str) -> None:
        """Remove the file of a lock that is held alone; who waits for it sees that and makes a new one."""
        (self.folder / ".locks" / digest).unlink(missing_ok=True)

    def _use(self, digest: str) -> None:
        now = time.time_ns()  # the kernel's own time of change is a few milliseconds coarse
        os.utime(self.folder / digest, ns=(now, now))

    # ----------------------------------------------------------------------------------------------------------- locks

    @contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[None]:
        handle = self._take(name, kind)
        assert handle is not None
        try:
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _try_lock(self, name: str) -> Iterator[bool]:
        handle = self._take(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield handle is not None
        finally:
            if handle is not None:
                os.close(handle)

    def _take(self, name: str, kind: int) -> int | None:
        """A handle that holds the lock until it is closed; None if another has it and we shall not wait."""
        path = self.folder / ".locks" / name
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, kind)
                if _is_still(handle, path):
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # whoever removed the adapter removed its lock too


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
