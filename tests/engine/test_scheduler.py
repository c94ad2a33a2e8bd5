"""Who is next, and in which slot: fairness by tokens, and what a slot may be used again for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ftray.engine.request import Request
from ftray.engine.scheduler import READ, WRITTEN, FairQueue, shares
from ftray.engine.sequence import WORTH_COPYING, Sequence, SlotTable, common
from ftray.registry.ref import Ref

# ------------------------------------------------------------------------------------------------------- fair queue


@dataclass(eq=False)
class Item:
    tenant: str
    prompt: int
    answer: int


@dataclass
class Server:
    """As the engine uses the queue: prompts are charged when they begin, a token of each running one a step."""

    slots: int
    queue: FairQueue[Item] = field(default_factory=FairQueue)
    running: list[Item] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    """Weighted tokens of each tenant since the beginning."""
    began: list[Item] = field(default_factory=list)

    def push(self, tenant: str, prompt: int, answer: int) -> Item:
        item = Item(tenant, prompt, answer)
        self.queue.push(tenant, item)
        return item

    def step(self, most: int | None = None) -> None:
        while len(self.running) < self.slots and (item := self.queue.pop(lambda _: True, most)):
            self.running.append(item)
            self.began.append(item)
            self.queue.charge(item.tenant, read=item.prompt)
            self.served[item.tenant] += READ * item.prompt
        for item in list(self.running):
            self.queue.charge(item.tenant, written=1)
            self.served[item.tenant] += WRITTEN
            item.answer -= 1
            if not item.answer:
                self.running.remove(item)
                self.queue.done(item.tenant)


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 30))


@given(st.integers(1, 8), st.lists(st.lists(SIZES, min_size=1, max_size=5), min_size=2, max_size=5))
@settings(max_examples=60)
def test_tenants_with_work_waiting_are_served_alike(slots, kinds):
    """Theorem 4.4 of the paper: of two tenants who always have work waiting, none is ever served more than
    2 · max(weight · longest prompt, weight · tokens that fit) ahead of the other."""
    server = Server(slots)
    longest = max(prompt for sizes in kinds for prompt, _ in sizes)
    fit = slots * max(prompt + answer for sizes in kinds for prompt, answer in sizes)
    bound = 2 * max(READ * longest, WRITTEN * fit)
    waiting = Counter[str]()
    for step in range(300):
        for number, sizes in enumerate(kinds):
            tenant = str(number)
            while sum(item.tenant == tenant for item in server.queue.waiting()) < slots + 1:
                server.push(tenant, *sizes[waiting[tenant] % len(sizes)])
                waiting[tenant] += 1
        server.step()
        served = [server.served[str(number)] for number in range(len(kinds))]
        assert max(served) - min(served) <= bound, step


def test_many_that_wait_do_not_take_all_slots_that_are_free_at_once():
    """Both are there before the first slot is given: what begins is charged when it begins."""
    server = Server(8)
    for _ in range(200):
        server.push("a", 10, 50)
    for _ in range(4):
        server.push("b", 10, 50)
    server.step()
    assert Counter(item.tenant for item in server.began) == {"a": 4, "b": 4}


def test_within_a_tenant_first_come_first_served():
    server = Server(2)
    items = [server.push("a", 3, 2) for _ in range(9)]
    while server.running or len(server.queue):
        server.step()
    assert server.began == items


def test_a_newcomer_gets_no_credit_for_the_time_that_it_was_away():
    server = Server(1)
    for _ in range(100):
        server.push("a", 10, 10)
    for _ in range(500):
        server.step()
    server.began.clear()
    for _ in range(20):
        server.push("b", 10, 10)
    for _ in range(200):
        server.step()
    count = Counter(item.tenant for item in server.began)
    assert abs(count["a"] - count["b"]) <= 1, "they take turns from the beginning"


def test_one_that_leaves_does_not_come_back_without_its_debt():
    server = Server(2)
    server.push("b", 5, 400)
    server.push("a", 500, 1)
    server.step()  # a has been served 502, b 7, and a has left
    server.step()
    server.push("a", 10, 1)
    server.push("b", 10, 1)
    server.step()
    assert server.began[-1].tenant == "b"


def test_what_a_tenant_owed_is_forgotten_once_others_have_had_as_much():
    queue: FairQueue[int] = FairQueue()
    queue.push("a", 1)
    queue.push("b", 2)
    assert queue.pop(lambda _: True) == 1
    queue.charge("a", read=100)
    queue.done("a")
    assert queue._served["a"] == 100
    assert queue.pop(lambda _: True) == 2
    queue.charge("b", read=150)
    queue.push("c", 3)  # level with b
    assert queue._served["c"] == 150
    queue.remove("c", 3)
    assert queue._served.keys() == {"b"}
    queue.done("b")
    assert not queue._served
    assert not queue._running


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["push", "pop", "done", "charge"])), max_size=80))
def test_counters_never_fall_below_those_of_who_is_there(actions):
    """However tenants come and go: one who comes is never behind all who are there, and nothing is kept of nobody."""
    queue: FairQueue[int] = FairQueue()
    running: list[str] = []
    for number, (tenant, action) in enumerate(actions):
        if action == "push":
            here = queue._active() - {tenant}
            was_here = tenant in queue._active()
            queue.push(tenant, number)
            if here and not was_here:
                assert queue._served[tenant] >= min(queue._served[t] for t in here)
        elif action == "pop":
            before = {item: t for t, items in queue._waiting.items() for item in items}
            least = min((queue._served[t] for t in queue._waiting), default=0)
            item = queue.pop(lambda _: True)
            if item is not None:
                assert queue._served[before[item]] == least
                running.append(before[item])
        elif action == "done" and tenant in running:
            running.remove(tenant)
            queue.done(tenant)
        elif action == "charge" and tenant in running:
            queue.charge(tenant, number, 1)
        assert queue._running == Counter(running)
        assert queue._active() <= queue._served.keys()
        if not queue._active():
            assert not queue._served


def test_who_is_not_ready_is_passed_over():
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "b1"):
        queue.push(item[0], item)
    assert queue.pop(lambda item: item == "b1") == "b1"
    assert queue.pop(lambda item: item == "a2") == "a2"
    assert queue.pop(lambda _: False) is None
    assert list(queue.waiting()) == ["a1"]
    assert len(queue) == 1


def test_most_holds_while_others_wait():
    queue: FairQueue[int] = FairQueue()
    for number in range(6):
        queue.push("a", number)
    assert [queue.pop(lambda _: True, 2) for _ in range(3)] == [0, 1, 2], "alone it may have all"
    queue.push("b", 10)
    queue.push("b", 11)
    queue.charge("b", read=1000)
    assert queue.pop(lambda _: True, 2) == 10, "a has three"
    assert queue.pop(lambda _: True, 2) == 11
    assert queue.pop(lambda _: True, 2) == 3, "nobody else waits"
    for _ in range(3):
        queue.done("a")
    queue.push("b", 12)
    assert queue.pop(lambda _: True, 2) == 4
    assert queue.pop(lambda _: True, 2) is None, "both have two"


def test_removed_items_are_never_served():
    queue: FairQueue[int] = FairQueue()
    for number in range(4):
        queue.push("a", number)
    queue.remove("a", 0)
    queue.remove("a", 2)
    assert [queue.pop(lambda _: True) for _ in range(3)] == [1, 3, None]
    with pytest.raises(KeyError):
        queue.remove("a", 1)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50)), st.integers(0, 200))
def test_shares_are_as_even_as_wishes_allow(wanted, left):
    found = shares(wanted, left)
    assert found.keys() == wanted.keys()
    assert sum(found.values()) == min(left, sum(wanted.values()))
    unmet = [found[tenant] for tenant in wanted if found[tenant] < wanted[tenant]]
    assert all(0 <= found[tenant] <= wanted[tenant] for tenant in wanted)
    if unmet:
        assert max(found.values()) - min(unmet) <= 1


# ------------------------------------------------------------------------------------------------------------ slots


@given(
    st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 50), st.data()
)
def test_common_is_the_longest_common_beginning(a, b, most, data):
    if data.draw(st.booleans()):  # lists that begin alike are rare otherwise
        b = a[: data.draw(st.integers(0, len(a)))] + b
    expected = 0
    while expected < min(len(a), len(b), most) and a[expected] == b[expected]:
        expected += 1
    assert common(a, b, most) == expected


TENANTS = ("t", "u")
ADAPTERS = (None, Ref("t", "a", "d1"), Ref("t", "b", "d2"))
FEW = st.sampled_from(
    [[1] * 40, [1] * 20 + [2] * 20, [1] * 8 + [2] * 9, [1] * 15 + [3], [1] * 16 + [3] * 3, [2] * 30, [1], [2, 1]]
)


class Slots(RuleBasedStateMachine):
    """A table beside memory as it really is: (owner, token) at every place of every slot."""

    @initialize(count=st.integers(1, 5), reuse=st.booleans())
    def begin(self, count, reuse):
        self.table, self.reuse = SlotTable(count), reuse
        self.memory: list[list[Any]] = [[] for _ in range(count)]
        self.valid = [0] * count
        """Places that the last sequence has written, or found; 0 where they may not be used again."""
        self.running: list[Sequence] = []
        self.freed = list(range(count))

    @precondition(lambda self: self.freed)
    @rule(tenant=st.sampled_from(TENANTS), adapter=st.sampled_from(ADAPTERS), tokens=FEW)
    def take(self, tenant, adapter, tokens):
        sequence = Sequence(Request("x", tuple(tokens), adapter=adapter, tenant=tenant), None, None)  # type: ignore[arg-type]
        sequence.begins()
        owner = (tenant, adapter.digest if adapter else None)
        own = [(owner, token) for token in sequence.tokens]
        lengths = {}
        for slot, memory in enumerate(self.memory):
            lengths[slot] = common(own, memory, min(self.valid[slot], len(tokens) - 1))  # type: ignore[arg-type]
        usable = [n for slot, n in lengths.items() if slot in self.freed or n >= WORTH_COPYING]
        known, source = self.table.take(sequence, self.reuse)
        assert known == (max(usable, default=0) if self.reuse else 0)
        assert sequence.slot in self.freed
        if source is not None:
            assert known >= WORTH_COPYING
            assert source not in self.freed
            assert known > max(lengths[slot] for slot in self.freed), "a free one would need no copy"
            self.memory[sequence.slot] = self.memory[source][:known]
        elif not known and not self.reuse:
            assert sequence.slot == self.freed[0], "the one that has been free for longest"
        assert self.memory[sequence.slot][:known] == own[:known], "what is there is the owner's, token by token"
        self.memory[sequence.slot] = own[:known]
        self.valid[sequence.slot] = sequence.done = known
        self.freed.remove(sequence.slot)
        self.running.append(sequence)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), count=st.integers(1, 30), answer=st.sampled_from([1, 2]))
    def go_on(self, which, count, answer):
        sequence = self.running[which % len(self.running)]
        for _ in range(count):
            sequence.done += 1
            if sequence.done == len(sequence.tokens):
                sequence.tokens.append(answer)
        self.memory[sequence.slot] = [(sequence.owner, token) for token in sequence.tokens[: sequence.done]]
        self.valid[sequence.slot] = sequence.done

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9), good=st.booleans())
    def end(self, which, good):
        sequence = self.running.pop(which % len(self.running))
        self.table.give_back(sequence)
        self.freed.append(sequence.slot)
        if not good:
            self.table.forget(sequence.slot)
            self.valid[sequence.slot] = 0

    @invariant()
    def free_slots_are_exact_and_in_order(self):
        if hasattr(self, "table"):
            assert list(self.table.free) == self.freed


Slots.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
test_slots = Slots.TestCase


def test_a_slot_is_given_back_once():
    table = SlotTable(1)
    sequence = Sequence(Request("x", (1, 2)), None, None)  # type: ignore[arg-type]
    table.take(sequence, True)
    table.give_back(sequence)
    with pytest.raises(AssertionError):
        table.give_back(sequence)
