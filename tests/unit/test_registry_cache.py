"""The cache on the local disk: fetched once, checked again, never taken from under its user, alive after kill -9."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ftray.errors import ArtefactError, RunError, UnknownAdapter
from ftray.registry.cache import Cache, Kept, to_evict
from ftray.registry.check import Limits, check
from ftray.registry.facts import CONFIG, FACTS, WEIGHTS
from ftray.registry.publish import publish
from ftray.registry.ref import Ref
from ftray.registry.store import Registry
from tests.adapters import BASE, change_tensors, tensors_of, write_adapter

ROOT = Path(__file__).parents[2]


class Counting(Registry):
    """A registry that is slow, and counts the files that are fetched from it."""

    def __init__(self, uri: str, seconds: float = 0.0) -> None:
        super().__init__(uri)
        self.seconds, self.downloads = seconds, 0

    def download(self, *args, **options) -> None:
        self.downloads += 1
        time.sleep(self.seconds)
        super().download(*args, **options)


@pytest.fixture
def registry(tmp_path) -> Counting:
    return Counting(str(tmp_path / "registry"))


def put(registry: Registry, tmp_path: Path, seed: int, rank: int = 2) -> Ref:
    write_adapter(tmp_path / f"made-{seed}", seed, rank)
    return publish(tmp_path / f"made-{seed}", registry, "anna", f"a{seed}", BASE).ref


def cache_of(tmp_path: Path, registry: Registry, limit: int = 1 << 20, **options) -> Cache:
    return Cache(tmp_path / "cache", limit, registry, BASE, **options)


def size_of(tmp_path: Path, seed: int) -> int:
    return sum(p.stat().st_size for p in (tmp_path / f"made-{seed}").iterdir())


def kept(cache: Cache) -> set[str]:
    found, reserved = cache.usage()
    assert reserved == 0
    return {each.digest for each in found}


def litter(cache: Cache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if path.name.endswith(".part")]


def test_an_adapter_is_fetched_once_and_whole(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    for _ in range(3):
        with cache.get(ref) as folder:
            check(folder, BASE, digest=ref.digest)
    assert registry.downloads == 3  # card, configuration, weights
    assert cache.fetched == 1
    with cache_of(tmp_path, registry).get(ref):  # another process would find it too
        pass
    assert registry.downloads == 3
    assert litter(cache) == []


def test_one_digest_is_kept_once_whoevers_it_is(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    other = publish(tmp_path / "made-1", registry, "berta", "mine", BASE).ref
    assert other.digest == ref.digest
    with cache.get(ref) as a, cache.get(other) as b:
        assert a == b
    assert cache.fetched == 1


# -------------------------------------------------------------------------------------- many at once


def test_threads_share_one_fetch(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    registry.seconds = 0.05

    def one(_) -> bool:
        with cache.get(ref) as folder:
            return (folder / WEIGHTS).is_file()

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(64)))
    assert registry.downloads == 3


def test_threads_share_the_error_too(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    registry.seconds = 0.05
    damage(registry, ref, WEIGHTS)

    def one(_) -> str:
        with pytest.raises(ArtefactError) as error, cache.get(ref):
            pass
        return str(error.value)

    with ThreadPoolExecutor(16) as pool:
        told = set(pool.map(one, range(64)))
    assert len(told) == 1
    assert "SHA-256 differs" in told.pop()
    assert registry.downloads == 3
    assert kept(cache) == set()
    assert litter(cache) == []


def test_others_are_fetched_meanwhile(tmp_path, registry):
    slow, quick, cache = put(registry, tmp_path, 1), put(registry, tmp_path, 2), cache_of(tmp_path, registry)
    begun, go_on = threading.Event(), threading.Event()
    real = registry.download

    def download(ref, *args):
        if ref == slow:
            begun.set()
            assert go_on.wait(30)
        real(ref, *args)

    registry.download = download  # type: ignore[method-assign]

    def get_slow() -> None:
        with cache.get(slow):
            pass

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(get_slow)
        assert begun.wait(30)
        assert [name for name in litter(cache) if slow.digest in name]
        with cache.get(quick):
            assert not (cache.folder / slow.digest).exists()  # half of it is not to be seen
        go_on.set()
        future.result()


PROCESS = """
import sys, time
from pathlib import Path
from ftray.registry.cache import Cache
from ftray.registry.check import check
from ftray.registry.ref import Ref
from ftray.registry.store import Registry
from tests.adapters import BASE

class Slow(Registry):
    def download(self, *args):
        time.sleep(0.1)
        super().download(*args)

folder, limit, uri, digest, start = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5])
cache = Cache(folder, limit, Slow(uri), BASE)
print("ready", flush=True)
while not start.exists():
    time.sleep(0.005)
with cache.get(Ref("anna", "a1", digest)) as path:
    check(path, BASE, digest=digest)
print(cache.fetched)
"""


def test_processes_share_one_fetch(tmp_path, registry):
    ref = put(registry, tmp_path, 1)
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(1 << 20), registry.uri, ref.digest]
    command.append(str(tmp_path / "start"))
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(4)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "start").touch()
    told = [process.communicate(timeout=60)[0].strip() for process in running]
    assert sorted(told) == ["0", "0", "0", "1"]


# -------------------------------------------------------------------------------------- room


def test_the_longest_unused_go_first(tmp_path, registry):
    a, b, c = (put(registry, tmp_path, seed) for seed in (1, 2, 3))
    limit = size_of(tmp_path, 1) + size_of(tmp_path, 2) + 10
    cache = cache_of(tmp_path, registry, limit)
    for ref in (a, b, a, c):
        with cache.get(ref):
            pass
    assert kept(cache) == {a.digest, c.digest}
    assert cache.evicted == 1
    assert sorted(p.name for p in (cache.folder / ".locks").iterdir()) == sorted([a.digest, c.digest, "room"])


def test_who_waited_for_a_lock_that_was_removed_takes_the_new_one(tmp_path, registry):
    """Else it would use an adapter under a lock that nobody else sees."""
    cache, digest, got = cache_of(tmp_path, registry), "0" * 64, threading.Event()

    def wait() -> None:
        with cache._lock(digest, fcntl.LOCK_SH):
            got.set()

    with ThreadPoolExecutor(1) as pool, ExitStack() as newer:
        with cache._lock(digest, fcntl.LOCK_EX):
            future = pool.submit(wait)
            time.sleep(0.2)
            cache._forget_lock(digest)
            newer.enter_context(cache._lock(digest, fcntl.LOCK_EX))
        assert not got.wait(0.5)
        newer.close()
        future.result(30)


def test_what_is_in_use_stays_and_another_goes(tmp_path, registry):
    a, b, c = (put(registry, tmp_path, seed) for seed in (1, 2, 3))
    cache = cache_of(tmp_path, registry, size_of(tmp_path, 1) + size_of(tmp_path, 2) + 10)
    with cache.get(a) as folder:
        for ref in (b, c, b, c):
            with cache.get(ref):
                check(folder, BASE, digest=a.digest)
    assert a.digest in kept(cache)


def test_room_is_waited_for(tmp_path, registry):
    a, b = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    cache = cache_of(tmp_path, registry, size_of(tmp_path, 1) + 10, patience_seconds=30)
    with ThreadPoolExecutor(1) as pool:
        with cache.get(a) as folder:
            future = pool.submit(lambda: cache.get(b).__enter__())
            time.sleep(0.3)
            assert not future.done()
            check(folder, BASE)
        assert future.result(30).name == b.digest
    assert kept(cache) == {b.digest}


def test_without_room_it_says_so_and_works_again_later(tmp_path, registry):
    a, b = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    cache = cache_of(tmp_path, registry, size_of(tmp_path, 1) + 10, patience_seconds=0.1)
    with cache.get(a), pytest.raises(RunError, match="no room"), cache.get(b):
        pass
    with cache.get(b):
        pass
    assert kept(cache) == {b.digest}


def test_an_adapter_larger_than_the_cache_evicts_nobody(tmp_path, registry):
    a, b = put(registry, tmp_path, 1), put(registry, tmp_path, 2, rank=16)
    cache = cache_of(tmp_path, registry, size_of(tmp_path, 1) + 10)
    with cache.get(a):
        pass
    with pytest.raises(ArtefactError, match="may hold"), cache.get(b):
        pass
    assert kept(cache) == {a.digest}


def test_many_threads_in_little_room(tmp_path, registry):
    """Whatever the order: nobody loses a folder in use, and the limit holds."""
    refs = [put(registry, tmp_path, seed) for seed in range(6)]
    limit = 3 * max(size_of(tmp_path, seed) for seed in range(6))
    cache = cache_of(tmp_path, registry, limit)
    over: list[int] = []

    def one(number: int) -> None:
        ref = refs[(number * 7 + number // 6) % 6]
        with cache.get(ref) as folder:
            check(folder, BASE, digest=ref.digest)
            used, reserved = cache.usage()
            if (total := sum(each.size for each in used) + reserved) > limit:
                over.append(total)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(120)))
    assert over == []
    assert cache.evicted > 3
    assert litter(cache) == []


# -------------------------------------------------------------------------------------- damaged


def damage(registry: Registry, ref: Ref, name: str) -> None:
    """Flip a bit of a file in the registry."""
    path = Path(registry.root, ref.tenant, ref.name, ref.digest, name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, FACTS])
@pytest.mark.parametrize("how", ["flip", "cut", "remove", "link", "extra"])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_damaged_copy_is_fetched_again(tmp_path, registry, name, how, same_process):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    with cache.get(ref) as folder:
        pass
    path = folder / name
    content = path.read_bytes()
    if how == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "extra":
        (folder / f"{name}.bin").write_bytes(b"x")
    else:
        path.unlink()
        if how == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
    cache = cache if same_process else cache_of(tmp_path, registry)
    with cache.get(ref) as folder:
        check(folder, BASE, digest=ref.digest)
        assert path.read_bytes() == content
    assert registry.downloads == 6


def test_a_bit_that_rots_without_a_trace_is_found_by_the_next_process(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    with cache.get(ref) as folder:
        pass
    path = folder / WEIGHTS
    status, content = path.stat(), path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with cache_of(tmp_path, registry).get(ref):
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "says"), [(FACTS, "is damaged in the registry"), (WEIGHTS, "SHA-256 differs"), (CONFIG, "SHA-256 differs")]
)
def test_what_is_damaged_in_the_registry_is_refused_for_a_while(tmp_path, registry, monkeypatch, name, says):
    now = 100.0
    clock = SimpleNamespace(monotonic=lambda: now, time_ns=time.time_ns, sleep=time.sleep)
    monkeypatch.setattr("ftray.registry.cache.time", clock)
    ref, good = put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    cache = cache_of(tmp_path, registry, remember_seconds=30)
    damage(registry, ref, name)
    for _ in range(5):
        with pytest.raises(ArtefactError, match=says), cache.get(ref):
            pass
    assert registry.downloads <= 3  # it was fetched once
    with cache.get(good):
        pass
    assert kept(cache) == {good.digest}
    damage(registry, ref, name)  # the bit is put back
    now += 29
    with pytest.raises(ArtefactError, match=says), cache.get(ref):
        pass
    now += 2
    with cache.get(ref):
        pass


def test_a_lying_size_never_fills_the_disk(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    path = Path(registry.root, "anna", "a1", ref.digest, WEIGHTS)
    length = path.stat().st_size
    os.truncate(path, 1 << 40)  # a hole
    started = time.thread_time()
    with pytest.raises(ArtefactError, match=f"more than the {length:,} bytes"), cache.get(ref):
        pass
    assert time.thread_time() - started < 15
    os.truncate(path, length - 1)
    with pytest.raises(ArtefactError, match="less than"), cache_of(tmp_path, registry).get(ref):
        pass


def test_an_adapter_that_the_publisher_did_not_check_is_checked_here(tmp_path, registry):
    """Put into the store by somebody with the right to write there: right checksums, values that are not finite."""
    write_adapter(tmp_path / "made-1", 1)
    tensors = tensors_of(tmp_path / "made-1")
    next(iter(tensors.values())).flat[0] = float("nan")
    change_tensors(tmp_path / "made-1", tensors)
    from ftray.registry.facts import digest_of_facts

    digest = digest_of_facts((tmp_path / "made-1" / FACTS).read_bytes())
    shutil.copytree(tmp_path / "made-1", Path(registry.root, "anna", "a1", digest))
    cache = cache_of(tmp_path, registry)
    with pytest.raises(ArtefactError, match="not finite"), cache.get(Ref("anna", "a1", digest)):
        pass
    assert kept(cache) == set()


@pytest.mark.parametrize("wrong", ["digest", "chat_template"])
def test_a_foreign_base_is_refused_before_anything_is_fetched(tmp_path, registry, wrong):
    ref = put(registry, tmp_path, 1)
    other = dataclasses.replace(BASE, **{wrong: "0dd0" * 16})
    cache = Cache(tmp_path / "cache", 1 << 20, registry, other)
    with pytest.raises(ArtefactError, match="trained"), cache.get(ref):
        pass
    assert registry.downloads == 0


def test_limits_hold_before_anything_is_fetched(tmp_path, registry):
    ref = put(registry, tmp_path, 1)
    cache = cache_of(tmp_path, registry, limits=Limits(adapter_bytes=1000))
    with pytest.raises(ArtefactError, match="the limit adapter_bytes"), cache.get(ref):
        pass
    assert registry.downloads == 0


def test_names_that_were_made_up_leave_nothing(tmp_path, registry):
    cache = cache_of(tmp_path, registry)
    for number in range(200):
        with pytest.raises(UnknownAdapter), cache.get(Ref("anna", "x", f"{number:064x}")):
            pass
    assert list((cache.folder / ".locks").iterdir()) == []
    assert not cache._refused
    assert not cache._fetching


def test_an_adapter_removed_from_the_registry_is_served_from_here(tmp_path, registry):
    ref, cache = put(registry, tmp_path, 1), cache_of(tmp_path, registry)
    with cache.get(ref):
        pass
    registry.remove_name("anna", "a1")
    with cache.get(ref) as folder:
        check(folder, BASE)


# -------------------------------------------------------------------------------------- killed

KILLED = """
import os, signal, sys
from pathlib import Path
from ftray.registry import cache as module
from ftray.registry.ref import Ref
from ftray.registry.store import Registry
from tests.adapters import BASE

when, folder, limit, uri, digest = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]

def die(*_args, **_options): os.kill(os.getpid(), signal.SIGKILL)

class Dying(Registry):
    def download(self, ref, name, size, to):
        if when == name:
            Path(to).write_bytes(b"half")
            die()
        super().download(ref, name, size, to)

if when == "check":
    module.check = die
if when == "replace":
    module.os.replace = die
if when == "evict":
    module.Cache._forget_lock = die
with module.Cache(folder, limit, Dying(uri), BASE).get(Ref("anna", "a1", digest)):
    die()
"""


@pytest.mark.parametrize("when", [CONFIG, WEIGHTS, "check", "replace", "in use", "evict"])
def test_after_kill_9_everything_works_and_the_litter_goes(tmp_path, registry, when):
    old, ref, other = put(registry, tmp_path, 0), put(registry, tmp_path, 1), put(registry, tmp_path, 2)
    limit = size_of(tmp_path, 1) + size_of(tmp_path, 2) + 10
    cache = cache_of(tmp_path, registry, limit, patience_seconds=1)
    if when == "evict":  # the other process has to make room
        for each in (old, other):
            with cache.get(each):
                pass
    command = [sys.executable, "-c", KILLED, when, str(cache.folder), str(limit), registry.uri, ref.digest]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (cache.folder / ref.digest).exists() == (when == "in use")
    for each in (other, ref, other):  # both fit, if what was left half takes no room
        with cache.get(each) as folder:
            check(folder, BASE, digest=each.digest)
    assert litter(cache) == []
    assert kept(cache) == {ref.digest, other.digest}
    with cache.get(old):
        pass
    assert kept(cache) == {old.digest, other.digest}


# -------------------------------------------------------------------------------------- properties

KEPT = st.lists(
    st.builds(Kept, st.uuids().map(str), st.integers(0, 100), st.integers(0, 20)),
    max_size=8,
    unique_by=lambda k: k.digest,
)


@given(KEPT, st.integers(0, 200), st.integers(0, 400))
def test_eviction_is_by_age_no_more_than_needed(kept, need, limit):
    gone = to_evict(kept, need, limit)
    by_age = sorted(kept, key=lambda each: (each.used_ns, each.digest))
    assert gone == [each.digest for each in by_age[: len(gone)]]  # the oldest, in order
    left = sum(each.size for each in by_age[len(gone) :])
    assert left + need <= limit or len(gone) == len(kept)
    if gone:  # one fewer would not have been enough
        assert left + by_age[len(gone) - 1].size + need > limit


COUNT = 5


@functools.cache
def _published() -> tuple[tempfile.TemporaryDirectory, Counting, list[Ref], dict[str, int]]:
    """(what removes the folder when the tests end, a registry, adapters in it, their sizes)"""
    temporary = tempfile.TemporaryDirectory(prefix="ftray-test-")
    folder = Path(temporary.name)
    registry = Counting(str(folder / "registry"))
    refs = [put(registry, folder, seed, rank=1 + seed) for seed in range(COUNT)]
    return temporary, registry, refs, {ref.digest: size_of(folder, seed) for seed, ref in enumerate(refs)}


class CacheAgainstModel(RuleBasedStateMachine):
    """Any order of getting, holding, letting go and damaging, against a list in the order of use."""

    def __init__(self) -> None:
        super().__init__()
        _, registry, self.refs, self.sizes = _published()
        self.folder = Path(tempfile.mkdtemp(prefix="ftray-test-"))
        self.limit = int(2.3 * max(self.sizes.values()))
        self.cache = cache_of(self.folder, registry, self.limit, patience_seconds=0.0)
        self.order: OrderedDict[str, None] = OrderedDict()
        """What should be kept, the longest unused first."""
        self.held: list[tuple[str, ExitStack]] = []

    def teardown(self) -> None:
        for _, stack in self.held:
            stack.close()
        shutil.rmtree(self.folder)

    def expect(self, digest: str) -> bool:
        """Let the model do what a get must do; whether it can succeed."""
        if digest not in self.order:
            in_use = {held for held, _ in self.held}
            need = self.sizes[digest]
            for old in list(self.order):
                if sum(self.sizes[d] for d in self.order) + need > self.limit and old not in in_use:
                    del self.order[old]
            if sum(self.sizes[d] for d in self.order) + need > self.limit:
                return False
            self.order[digest] = None
        self.order.move_to_end(digest)
        return True

    @rule(which=st.integers(0, COUNT - 1))
    def get(self, which: int) -> None:
        ref = self.refs[which]
        if self.expect(ref.digest):
            with self.cache.get(ref) as folder:
                assert (folder / WEIGHTS).stat().st_size > 0
        else:
            with pytest.raises(RunError, match="no room"), self.cache.get(ref):
                pass

    @precondition(lambda self: len(self.held) < 3)
    @rule(which=st.integers(0, COUNT - 1))
    def hold(self, which: int) -> None:
        ref, stack = self.refs[which], ExitStack()
        if self.expect(ref.digest):
            stack.enter_context(self.cache.get(ref))
            self.held.append((ref.digest, stack))
        else:
            with pytest.raises(RunError, match="no room"):
                stack.enter_context(self.cache.get(ref))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 2))
    def let_go(self, which: int) -> None:
        digest, stack = self.held.pop(which % len(self.held))
        stack.close()
        self.order.move_to_end(digest)

    @precondition(lambda self: any(d not in {h for h, _ in self.held} for d in self.order))
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        held = {digest for digest, _ in self.held}
        digest = data.draw(st.sampled_from(sorted(d for d in self.order if d not in held)))
        with open(self.cache.folder / digest / WEIGHTS, "ab") as file:
            file.write(b"x")
        which = next(i for i, ref in enumerate(self.refs) if ref.digest == digest)
        before = self.cache.fetched
        del self.order[digest]  # fetched again, so its place is asked for anew
        self.get(which)
        assert self.cache.fetched == before + 1

    @invariant()
    def as_the_model_says(self) -> None:
        found, reserved = self.cache.usage()
        assert reserved == 0
        assert {each.digest for each in found} == set(self.order)
        assert sum(each.size for each in found) <= self.limit
        assert {digest for digest, _ in self.held} <= set(self.order)


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
