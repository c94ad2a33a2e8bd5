"""Adapters on the move: read once for all who wait, given up when nobody uses them, broken for their own alone."""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import LlamaConfig, LlamaForCausalLM

from ftray.engine import adapters as module
from ftray.engine.adapters import FORGIVEN_AFTER, Adapters, Held
from ftray.errors import ArtefactError, UnknownAdapter
from ftray.model.pooled import Bottleneck, Delta, PooledModel
from ftray.model.served import Adapter
from ftray.registry.ref import Ref

PATH = "model.layers.0.mlp.up_proj"
PART = "model.layers.0.mlp"


def ref(name: str) -> Ref:
    return Ref("t", name, name)


def adapter(rank: int = 1, bottleneck: bool = False) -> Adapter:
    """40 · rank floats of 4 bytes, or as a bottleneck 33 · rank + 16."""
    if bottleneck:
        parts = (torch.ones(rank, 16), torch.ones(rank), torch.ones(rank, 16), torch.ones(16))
        return Adapter({}, {PART: Bottleneck(*parts, "relu")})
    return Adapter({PATH: Delta(torch.ones(rank, 16), torch.ones(rank, 24))}, {})


SIZE = adapter().nbytes


@pytest.fixture(scope="module")
def pooled() -> PooledModel:
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=24, vocab_size=32
    )
    return PooledModel(LlamaForCausalLM(config).requires_grad_(False))


class Store:
    """A registry whose adapters arrive when the test says so."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.gates: dict[str, threading.Event] = {}
        self.results: dict[str, Any] = {}
        self.arrived = threading.Semaphore(0)
        """Released once for each that has ended, well or not."""

    def load(self, wanted: Ref) -> Adapter:
        self.asked[wanted.name] += 1
        if wanted.name in self.gates:
            assert self.gates[wanted.name].wait(60)
        result = self.results.get(wanted.name, adapter())
        if isinstance(result, Exception):
            raise result
        return result

    def wait(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=60)


@pytest.fixture
def store():
    return Store()


@pytest.fixture
def new_adapters(pooled, store):
    made: list[Adapters] = []

    def new(on_device: int = 4, memory: int = 1 << 20, threads: int = 1) -> Adapters:
        wake = store.arrived.release
        made.append(Adapters(pooled, store.load, on_device=on_device, memory=memory, threads=threads, wake=wake))
        return made[-1]

    yield new
    for gate in store.gates.values():
        gate.set()
    for it in made:
        it.close()
    assert pooled.nbytes == 0, "closing gives all blocks back"


def read(adapters: Adapters, store: Store, *names: str) -> list[Held]:
    """Wanted once each, read and taken in, in this order."""
    held = []
    for name in names:
        held.append(adapters.want(ref(name), "t"))
        if not held[-1].settled:
            store.wait()
            adapters.collect()
    return held


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


# ------------------------------------------------------------------------------------------------------------- reading


def test_one_reading_is_shared_by_all_who_wait(new_adapters, store):
    adapters, gate = new_adapters(threads=4), threading.Event()
    store.gates["slow"] = gate
    waiting = [adapters.want(ref("slow"), "t") for _ in range(5)]
    adapters.collect()
    assert not waiting[0].settled
    assert all(held is waiting[0] for held in waiting)
    assert adapters.users == 5
    gate.set()
    store.wait()
    adapters.collect()
    assert waiting[0].adapter is not None
    assert adapters.want(ref("slow"), "t") is waiting[0]
    assert store.asked == {"slow": 1}
    assert (adapters.loads, adapters.memory) == (1, SIZE)


def test_a_slow_one_does_not_keep_others_where_there_are_more_threads(new_adapters, store):
    adapters = new_adapters(threads=2)
    store.gates["slow"] = threading.Event()
    slow = adapters.want(ref("slow"), "t")
    assert all(held.adapter for held in read(adapters, store, "a", "b", "c"))
    assert not slow.settled


def test_the_caller_is_woken_when_one_has_ended(new_adapters, store):
    adapters = new_adapters()
    store.results["bad"] = ArtefactError("broken")
    adapters.want(ref("good"), "t")
    adapters.want(ref("bad"), "t")
    store.wait(2)
    assert not store.arrived.acquire(timeout=0.05)


def test_nothing_is_taken_in_before_the_caller_was_woken(pooled, store):
    """Or it would be woken once more when all is done."""
    reached, go_on = threading.Event(), threading.Event()

    def wake() -> None:
        reached.set()
        assert go_on.wait(60)

    adapters = Adapters(pooled, store.load, on_device=1, memory=1 << 20, threads=1, wake=wake)
    held = adapters.want(ref("a"), "t")
    assert reached.wait(60)
    collecting = threading.Thread(target=adapters.collect)
    collecting.start()
    collecting.join(0.05)
    assert not held.settled
    go_on.set()
    collecting.join(60)
    assert held.adapter is not None
    adapters.close()


def test_the_thread_that_has_read_one_keeps_it_no_longer(pooled, store):
    store.results["a"] = made = adapter()
    kept, left = weakref.ref(made), []
    del made

    def wake() -> None:
        adapters._ended.clear()
        del store.results["a"]
        left.append(kept())
        store.arrived.release()

    adapters = Adapters(pooled, store.load, on_device=1, memory=1 << 20, threads=1, wake=wake)
    adapters.want(ref("a"), "t")
    store.wait()
    adapters.close()
    assert left == [None]


@pytest.mark.parametrize("name", ["known", "unknown"])
def test_an_error_goes_to_those_who_want_that_adapter(new_adapters, store, name):
    adapters = new_adapters()
    store.results["bad"] = UnknownAdapter("gone", where="t/bad") if name == "known" else ZeroDivisionError("oops")
    bad, good = read(adapters, store, "bad", "good")
    assert bad.adapter is None
    assert good.error is None
    assert good.adapter is not None
    assert (adapters.loads, adapters.failures) == (1, 1)
    if name == "known":
        assert bad.error is store.results["bad"]
    else:
        assert type(bad.error) is ArtefactError
        assert "ZeroDivisionError: oops" in bad.error.what
        assert bad.error.where == str(ref("bad"))
        assert bad.error.__cause__ is store.results["bad"]
    assert adapters.start(good)
    assert not adapters.start(bad)


def test_what_nobody_waits_for_any_more_is_not_read(new_adapters, store):
    adapters, gate = new_adapters(), threading.Event()
    store.gates["first"] = gate
    first = adapters.want(ref("first"), "t")
    for number in range(1000):
        adapters.leave(adapters.want(ref(str(number)), "t"))
    again = [adapters.want(ref("again"), "t") for _ in range(2)]
    adapters.leave(again[0])
    assert adapters._held.keys() == {"first", "again"}
    assert adapters.users == 2
    gate.set()
    store.wait(2)
    adapters.collect()
    assert first.adapter
    assert again[1].adapter, "one of two still waited"
    assert store.asked == {"first": 1, "again": 1}
    (held,) = read(adapters, store, "7")
    assert held.adapter, "it is read when it is wanted again"
    assert adapters._unread._of == {}


def test_tenants_take_turns_in_what_is_read(new_adapters, store):
    adapters, gate = new_adapters(), threading.Event()
    store.gates["a0"] = gate
    first = adapters.want(ref("a0"), "a")
    while not first.begun:
        time.sleep(0.001)
    for number in range(1, 40):
        adapters.want(ref(f"a{number}"), "a")
    for name in ("b0", "b1", "a39"):
        adapters.want(ref(name), "b")
    adapters.want(ref("c0"), "c")
    gate.set()
    store.wait(43)
    assert list(store.asked)[:8] == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "a39"]
    assert set(store.asked.values()) == {1}, "what two wait for is read once, when the first of them has his turn"


# ----------------------------------------------------------------------------------------------------------- forgiving


def test_a_broken_one_is_not_tried_again_at_once_and_then_it_is(new_adapters, store, clock):
    adapters = new_adapters()
    store.results["x"] = ArtefactError("broken")
    (held,) = read(adapters, store, "x")
    adapters.leave(held)
    clock.seconds += FORGIVEN_AFTER - 0.01
    again = adapters.want(ref("x"), "t")
    assert again.error is store.results["x"]
    adapters.leave(again)
    assert store.asked["x"] == 1
    clock.seconds += 0.02
    store.results["x"] = adapter()
    (good,) = read(adapters, store, "x")
    assert good.adapter is store.results["x"]
    assert good is not held
    assert store.asked["x"] == 2


def test_asking_again_and_again_does_not_keep_it_broken(new_adapters, store, clock):
    adapters = new_adapters()
    store.results["x"] = ArtefactError("broken")
    (held,) = read(adapters, store, "x")
    adapters.leave(held)
    store.results["x"] = adapter()
    for _ in range(8):
        clock.seconds += FORGIVEN_AFTER / 4
        (held,) = read(adapters, store, "x")
        adapters.leave(held)
    assert held.adapter is not None
    assert store.asked["x"] == 2


def test_broken_ones_that_nobody_asks_for_again_are_forgotten(new_adapters, store, clock):
    adapters = new_adapters()
    for number in range(50):
        store.results[str(number)] = ArtefactError("broken")
        adapters.leave(*read(adapters, store, str(number)))
    assert len(adapters._held) == 50
    clock.seconds += FORGIVEN_AFTER + 1
    adapters.collect()
    assert not adapters._held
    assert not adapters._broken


def test_who_still_waits_for_a_broken_one_keeps_its_error(new_adapters, store, clock):
    adapters = new_adapters()
    store.results["x"] = ArtefactError("broken")
    (held,) = read(adapters, store, "x")
    clock.seconds += FORGIVEN_AFTER + 1
    assert adapters.want(ref("x"), "t") is held
    assert adapters.users == 2


# ---------------------------------------------------------------------------------------------------------- two tiers


def on_device(adapters: Adapters) -> set[str]:
    return {held.ref.name for held in adapters._held.values() if held.on_device}


def test_the_device_gives_up_what_was_used_longest_ago_and_nothing_in_use(new_adapters, store, pooled):
    adapters = new_adapters(on_device=2)
    a, b, c = read(adapters, store, "a", "b", "c")
    assert adapters.start(a)
    assert adapters.start(b)
    assert not adapters.start(c), "both are in use"
    assert on_device(adapters) == {"a", "b"}
    adapters.stop(b)
    adapters.leave(b)
    assert on_device(adapters) == {"a", "b"}, "it stays while nobody needs the room"
    assert adapters.start(c)
    assert on_device(adapters) == {"a", "c"}
    assert pooled.linears[PATH].low.where.keys() == {"a", "c"}
    adapters.stop(c)
    adapters.stop(a)
    adapters.leave(c)
    adapters.leave(a)  # used last
    (b,) = read(adapters, store, "b")
    assert adapters.start(b)
    assert on_device(adapters) == {"a", "b"}
    assert store.asked == {"a": 1, "b": 1, "c": 1}, "it was still in memory"


def test_who_waits_for_a_place_gets_the_one_of_the_adapter_that_is_there_for_longest(new_adapters, store):
    adapters = new_adapters(on_device=2)
    a, b, c, d = read(adapters, store, "a", "b", "c", "d")
    for held in (b, a, b):
        assert adapters.start(held)
    assert not adapters.start(c)
    assert not adapters.start(d)
    assert not adapters.start(b), "it is to leave, and was there before a"
    assert adapters.start(a), "the others go on"
    adapters.stop(b)
    adapters.collect()
    assert not adapters.start(c), "one of b's still runs"
    assert not adapters.start(b)
    adapters.collect()
    assert adapters.start(b), "nobody waits for a place any more"
    adapters.collect()
    assert not adapters.start(c)
    for _ in range(2):
        adapters.stop(b)
    assert adapters.start(c)
    assert on_device(adapters) == {"a", "c"}
    assert not adapters.start(b)
    assert not adapters.start(a), "now it is a's turn"
    assert adapters.start(c)


def test_memory_gives_up_what_was_used_longest_ago_and_nothing_in_use(new_adapters, store, clock):
    adapters = new_adapters(memory=2 * SIZE)
    held = {}
    for name in "abcd":
        clock.seconds += 1
        (held[name],) = read(adapters, store, name)
    assert adapters.memory == 4 * SIZE, "all are in use"
    adapters.start(held["a"])
    for name in "bda":  # a runs until the end
        clock.seconds += 1
        if name == "a":
            adapters.stop(held["a"])
        adapters.leave(held[name])
    assert {r.name for r in adapters.resident()} == {"a", "c"}, "b was the first to go, d the second"
    assert (adapters.memory, adapters.evictions) == (2 * SIZE, 2)
    assert [r.name for r in adapters.resident()] == ["a", "c"]
    (again,) = read(adapters, store, "b")
    assert again.adapter is not None
    assert again is not held["b"]
    assert store.asked["b"] == 2
    assert on_device(adapters) == set(), "a went, from the device too"


def test_one_that_does_not_fit_into_memory_serves_while_it_is_used(new_adapters, store, pooled):
    adapters = new_adapters(memory=0)
    (a,) = read(adapters, store, "a")
    assert adapters.start(a)
    adapters.stop(a)
    adapters.leave(a)
    assert (adapters.memory, adapters.evictions, pooled.nbytes) == (0, 1, 0)


@pytest.mark.parametrize("wrong", ["path", "part", "input", "output", "ranks", "vector"])
def test_one_that_cannot_be_put_onto_the_device_fails_alone(new_adapters, store, pooled, clock, wrong):
    adapters = new_adapters()
    fits = {"model.layers.0.self_attn.q_proj": Delta(torch.ones(1, 16), torch.ones(1, 16))}
    misfits = {
        "path": Adapter({**fits, "nowhere": Delta()}, {}),
        "part": Adapter(fits, {"nowhere": adapter(bottleneck=True).bottlenecks[PART]}),
        "input": Adapter({**fits, PATH: Delta(torch.ones(1, 99), torch.ones(1, 24))}, {}),
        "output": Adapter({**fits, PATH: Delta(torch.ones(7, 16), torch.ones(7, 99))}, {}),
        "ranks": Adapter({**fits, PATH: Delta(torch.ones(2, 16), torch.ones(1, 24))}, {}),
        "vector": Adapter({**fits, PATH: Delta(scale_in=torch.ones(24))}, {}),
    }
    store.results["x"] = misfits[wrong]
    good, bad = read(adapters, store, "good", "x")
    assert adapters.start(good)
    assert not adapters.start(bad)
    assert bad.adapter is None
    assert "cannot be put onto the device" in bad.error.what
    assert bad.error.__cause__ is not None
    assert (adapters.memory, adapters.failures) == (SIZE, 1)
    store.wait()  # the engine is woken, to tell those who wait
    assert pooled.linears["model.layers.0.self_attn.q_proj"].low.where == {}
    assert not adapters.start(bad)
    adapters.leave(bad)
    clock.seconds += FORGIVEN_AFTER + 1
    store.results["x"] = adapter()
    (bad,) = read(adapters, store, "x")
    assert adapters.start(bad)
    assert pooled.linears[PATH].low.where.keys() == {"good", "x"}


def test_closing_does_not_wait_for_what_nobody_reads_yet(new_adapters, store):
    adapters, gate = new_adapters(), threading.Event()
    store.gates["slow"] = gate
    adapters.want(ref("slow"), "t")
    adapters.want(ref("later"), "t")
    threading.Thread(target=lambda: adapters._closing.wait(60) and gate.set()).start()
    adapters.close()
    assert store.asked["later"] == 0
    assert not store.arrived.acquire(timeout=0.05), "nobody is woken any more"


# ------------------------------------------------------------------------------------------------------ whatever comes


class Moves(RuleBasedStateMachine):
    """Requests that want, start, stop and leave in any order, beside a plain account of them."""

    pools: PooledModel

    @initialize(most=st.integers(1, 3), memory=st.integers(0, 6))
    def begin(self, most, memory):
        self.store, self.most, self.bound = Store(), most, memory * SIZE
        self.store.results = {"bad": ArtefactError("broken"), "misfit": Adapter({"nowhere": Delta()}, {})}
        self.store.results |= {"big": adapter(3), "other": adapter(2, bottleneck=True)}
        self.adapters = Adapters(
            self.pools, self.store.load, on_device=most, memory=self.bound, threads=2, wake=self.store.arrived.release
        )
        self.waiting: list[Held] = []
        self.running: list[Held] = []
        self.arrived: list[str] = []
        """Those on the device, in the order in which they came there."""
        self.leaving = ""

    @rule(name=st.sampled_from(["a", "b", "c", "d", "e", "big", "other", "bad", "misfit"]))
    def want(self, name):
        before, known = self.store.asked.total(), self.adapters._held.get(name)
        held = self.adapters.want(ref(name), "t")
        assert held.ref.name == name
        self.waiting.append(held)
        if held is not known:
            self.store.wait()
            assert self.store.asked.total() == before + 1
        else:
            assert self.store.asked.total() == before, "one that is held is not read again"

    @rule()
    def collect(self):
        self.adapters.collect()
        self.leaving = ""
        for held in self.waiting:
            assert held.settled
            assert (held.error is not None) == (held.ref.name == "bad" or held.adapter is None)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 20))
    def start(self, which):
        held = self.waiting[which % len(self.waiting)]
        name, used = held.ref.name, {h.ref.name for h in self.running}
        self._look()
        started = self.adapters.start(held)
        if held.adapter is None:
            assert not started
        elif held.ref.name == "misfit":
            assert not started
            assert len(used) == self.most, "it was not tried"
        else:
            assert started == (name != self.leaving and (name in used or len(used) < self.most))
        if held.adapter and name not in used and len(used) == self.most:
            self.leaving = self.leaving or self.arrived[0]
        if started:
            self.waiting.remove(held)
            self.running.append(held)
            self._look()
        elif held.ref.name == "misfit" and held.error and len(used) < self.most:
            self.store.arrived.acquire(blocking=False)  # woken, if it failed now

    def _look(self):
        here = on_device(self.adapters)
        self.arrived = [name for name in self.arrived if name in here]
        self.arrived += here - set(self.arrived)
        self.leaving = self.leaving if self.leaving in here else ""

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 20))
    def end(self, which):
        held = self.running.pop(which % len(self.running))
        self.adapters.stop(held)
        self.adapters.leave(held)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        held = self.waiting.pop(which % len(self.waiting))
        self.adapters.leave(held)

    @invariant()
    def bounds_hold_and_what_is_used_is_there(self):
        if not hasattr(self, "adapters"):
            return
        adapters, used = self.adapters, {held.ref.name for held in [*self.waiting, *self.running]}
        assert adapters.users == len(self.waiting) + len(self.running)
        assert len(on_device(adapters)) <= self.most
        assert {held.ref.name for held in self.running} <= on_device(adapters)
        ready = {held.ref.name: held for held in adapters._held.values() if held.adapter}
        assert used - {"bad", "misfit"} <= adapters._held.keys()
        assert all(adapters._held[held.ref.name] is held for held in [*self.waiting, *self.running])
        assert adapters.memory == sum(held.adapter.nbytes for held in ready.values())
        assert adapters.memory <= self.bound or ready.keys() <= used
        where = set(self.pools.linears[PATH].low.where)
        behind = [part.own.where.keys() for part in self.pools.bottlenecks.values()]
        assert where.union(*behind) == on_device(adapters)
        lost = sum(held.ref.name == "misfit" for held in adapters._broken.values())
        assert len(ready) == adapters.loads - adapters.evictions - lost

    def teardown(self):
        if hasattr(self, "adapters"):
            self.adapters.close()
            assert self.pools.nbytes == 0


def test_whatever_requests_do(pooled, monkeypatch):
    monkeypatch.setattr(module, "FORGIVEN_AFTER", math.inf)  # however long a move takes
    machine = type("OfBase", (Moves,), {"pools": pooled})
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
