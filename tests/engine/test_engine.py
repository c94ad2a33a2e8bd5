"""The engine around its requests: what it refuses, adapters that come late or change, threads, counts, beginnings."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref

import pytest

from ftray.engine.request import Grammar, Request, Sampling
from ftray.errors import ArtefactError, RequestError
from tests.engine.crowd import GREEDY, KINDS, PROMPT, Log, all_read, ask, run
from tests.toys import wait_until

# ------------------------------------------------------------------------------------------------------ what is refused


def test_requests_that_can_never_be_answered(base, engine):
    for request, what in (
        (Request("x", ()), "no tokens"),
        (Request("x", (base.config.vocab_size,)), "outside"),
        (Request("x", (-1,)), "outside"),
        (Request("x", (5,), Sampling(top_p=0)), "top_p"),
        (Request("x", (5,), Sampling(grammar=Grammar("json_schema", "{"))), "JSON"),
        (Request("x", (5,), Sampling(max_tokens=0)), "max_tokens"),
    ):
        with pytest.raises(RequestError, match=what):
            engine.add(request)
    assert engine.in_flight() == 0


def test_an_id_is_one_requests_until_it_has_ended(base, engine):
    engine.add(ask(base, "x"))
    with pytest.raises(RequestError, match="'x' is in flight"):
        engine.add(ask(base, "x"))
    log = run(engine)
    assert len(log.tokens["x"]) == 16
    assert len(run(engine, ask(base, "x")).tokens["x"]) == 16


# ------------------------------------------------------------------------------------ adapters that come late or change


def test_a_slow_adapter_keeps_nobody(base, engine, adapters):
    gate = threading.Event()
    adapters.special["slow"] = lambda: gate.wait(60) and adapters.make("slow")
    log = run(engine, ask(base, "x", GREEDY, "slow"), ask(base, "y"), until=lambda log: "y" in log.last)
    assert "x" not in log.last
    engine.step()
    assert not engine.wait(0.05), "nothing to do until it is there"
    threading.Timer(0.05, gate.set).start()
    assert engine.wait(60)
    run(engine, log=log)
    assert len(log.tokens["x"]) == 16


def test_one_that_is_replaced_finishes_what_it_has_begun(base, new_engine, adapters):
    """The same name, another digest."""
    engine = new_engine(adapter_memory=0)
    old, new = (run(engine, ask(base, "x", GREEDY, f"lora@{v}")).tokens["x"] for v in ("one", "second"))
    assert old != new
    assert len(adapters.asked) == 2
    log = run(engine, ask(base, "old", GREEDY, "lora@one"), until=lambda log: len(log.tokens["old"]) > 4)
    engine.add(ask(base, "new", GREEDY, "lora@second"))
    log.take(engine.step())
    all_read(engine)  # or the old one might come to its end meanwhile
    run(engine, until=lambda log: len(log.tokens["new"]) > 2, log=log)
    assert {ref.digest for ref in engine.stats().resident} == {"lora@one", "lora@second"}
    run(engine, log=log)
    assert (log.tokens["old"], log.tokens["new"]) == (old, new)
    engine.step()
    assert engine.stats().resident == ()
    assert engine.stats().adapter_bytes == 0


def test_an_adapter_that_was_given_up_leaves_the_memory(base, new_engine, adapters):
    engine = new_engine(adapter_memory=0)
    made = adapters.make("lora")
    adapters.special["lora"], kept = made, weakref.ref(made)
    del made
    run(engine, ask(base, "x", GREEDY, "lora"))
    del adapters.special["lora"]
    gc.collect()
    assert kept() is None, "the slot that remembers the tokens does not keep it"


# -------------------------------------------------------------------------------------------------------------- threads


def test_two_threads_add_and_cancel_while_one_steps(base, new_engine):
    engine = new_engine(slots=6, queue=500, tenant_queue=500)
    log, failed = Log(), []

    def client(name: str) -> None:
        choose = random.Random(name)
        try:
            for i in range(60):
                kind = choose.choice(KINDS)
                engine.add(ask(base, f"{name}{i}", Sampling(choose.randint(1, 8), ignore_end=True), kind, "A", name))
                if choose.random() < 0.3:
                    engine.cancel(f"{name}{choose.randint(0, i)}")
                engine.stats()
                time.sleep(choose.random() * 0.004)
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            failed.append(error)

    threads = [threading.Thread(target=client, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while any(thread.is_alive() for thread in threads) or engine.in_flight():
        engine.wait(0.05)
        log.take(engine.step())
        assert time.monotonic() < end
    assert not failed
    assert log.last.keys() == {f"{name}{i}" for name in "ab" for i in range(60)}
    assert {last.reason for last in log.last.values()} == {"length", "cancelled"}


def test_waiting_ends_when_there_is_something_to_do(base, engine, adapters):
    gate = threading.Event()
    adapters.special["slow"] = lambda: gate.wait(60) and adapters.make("slow")
    engine.step()
    before = time.monotonic()
    assert not engine.wait(0.1)
    assert time.monotonic() - before > 0.09
    threading.Timer(0.05, lambda: engine.add(ask(base, "x", GREEDY, "slow"))).start()
    assert engine.wait(60)
    engine.step()
    wait_until(lambda: adapters.asked)
    assert not engine.wait(0.05), "its adapter is not there"
    threading.Timer(0.05, lambda: engine.cancel("x")).start()
    assert engine.wait(60)
    assert [event.id for event in engine.step()] == ["x"]
    gate.set()
    assert engine.wait(60), "the adapter has come"


def test_it_is_awake_for_as_long_as_something_runs(base, engine):
    log = Log()
    engine.add(ask(base, "x", GREEDY, "prompt"))
    while engine.in_flight():
        assert engine.wait(60)
        log.take(engine.step())
    engine.step()
    assert not engine.wait(0)


# ---------------------------------------------------------------------------------------------------------------- stats


@pytest.mark.parametrize("length", [1, 8, 9, 24, 25])
def test_a_prompt_is_counted_however_it_is_cut(base, new_engine, length):
    engine = new_engine(prompt_tokens=8, step_tokens=8)
    request = Request("x", tuple(range(5, 5 + length)), GREEDY)
    run(engine, request)
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (length, 0)
    run(engine, request)
    assert (engine.stats().prompt_tokens, engine.stats().cached_tokens) == (length + 1, length - 1)


def test_what_it_counts(base, engine, adapters):
    adapters.special["broken"] = ArtefactError("broken")
    first, second = ask(base, "a", GREEDY, "lora", PROMPT * 2), ask(base, "b", GREEDY, "lora-two", "A")
    log = run(engine, first, second, ask(base, "c", GREEDY, "broken"))
    stats = engine.stats()
    assert stats.slots == 4
    assert stats.prompt_tokens == len(first.prompt) + len(second.prompt)
    assert stats.written_tokens == 32 == sum(map(len, log.tokens.values()))
    assert (stats.cached_tokens, stats.adapter_loads, stats.adapter_failures, stats.adapter_evictions) == (0, 2, 1, 0)
    assert stats.adapter_bytes == sum(adapters.make(name).nbytes for name in ("lora", "lora-two"))
    assert {ref.name for ref in stats.resident} == {"lora", "lora-two"}
    steps = stats.steps
    assert 16 <= steps <= 36, "one after the other, if an adapter took long"
    run(engine, ask(base, "d", GREEDY, "lora", PROMPT * 2))
    stats = engine.stats()
    assert stats.cached_tokens == len(first.prompt) - 1
    assert stats.prompt_tokens == len(first.prompt) + len(second.prompt) + 1
    assert stats.steps == steps + 16
    assert stats.resident[0].name == "lora", "used last"
    for i in range(9):
        engine.add(ask(base, str(i)))
    log.take(engine.step())
    assert (engine.stats().running, engine.stats().waiting) == (4, 5)
    run(engine, log=log)


# ----------------------------------------------------------------------------------------------------- slots used again


def test_a_beginning_that_is_there_is_not_read_again(base, engine):
    long = ask(base, "a", GREEDY, "lora", PROMPT * 2)
    first = run(engine, long)
    again = run(engine, Request("b", long.prompt, GREEDY, long.adapter, "t"))
    assert again.last["b"].usage.cached_tokens == len(long.prompt) - 1
    assert again.tokens["b"] == first.tokens["a"]
    half = Request("c", (*long.prompt[:20], 9, 9, 9), GREEDY, long.adapter, "t")
    log = run(engine, half)
    assert log.last["c"].usage.cached_tokens == 20
    fresh = run(engine, Request("d", half.prompt, GREEDY, long.adapter, "u"))
    assert fresh.last["d"].usage.cached_tokens == 0
    assert fresh.tokens["d"] == log.tokens["c"]


def test_what_a_cancelled_one_has_read_serves_the_next(base, new_engine):
    engine = new_engine(prompt_tokens=10, step_tokens=10)
    wanted = ask(base, "a", GREEDY, text=PROMPT * 3)
    engine.add(wanted)
    for _ in range(3):
        engine.step()
    engine.cancel("a")
    engine.step()
    log = run(engine, Request("b", wanted.prompt, GREEDY, None, "t"))
    assert log.last["b"].usage.cached_tokens == 30
    assert log.tokens["b"] == run(engine, Request("c", wanted.prompt, GREEDY, None, "u")).tokens["c"]


def test_what_an_error_leaves_serves_nobody(base, engine, adapters):
    adapters.special["bad"] = adapters.make("lora", float("nan"))
    for id in "ab":
        log = run(engine, ask(base, id, GREEDY, "bad", PROMPT * 2))
        assert log.last[id].usage.cached_tokens == 0


@pytest.mark.parametrize("kind", ["", "prefix", "prompt"])
def test_one_that_still_runs_lends_its_beginning(base, new_engine, kind):
    engine = new_engine(slots=3)
    long = ask(base, "a", Sampling(40, temperature=0, ignore_end=True), kind, PROMPT * 2)
    log = run(engine, long, until=lambda log: len(log.tokens["a"]) > 3)
    run(engine, Request("b", long.prompt, GREEDY, long.adapter, "t"), log=log)
    assert log.last["b"].usage.cached_tokens == len(long.prompt) - 1
    assert log.tokens["b"] == log.tokens["a"][:16]
