"""Tenants share the queue, the slots and what a step reads: none who comes with many keeps another waiting."""

from __future__ import annotations

import threading

import pytest

from ftray.engine.request import Grammar, Sampling
from ftray.errors import QueueFull, RequestError
from tests.engine.crowd import GREEDY, KINDS, PROMPT, Log, all_read, ask, load, run


def test_queues_are_bounded(base, new_engine):
    engine = new_engine(slots=2, queue=6, tenant_queue=3)
    for i in range(5):
        engine.add(ask(base, f"a{i}", tenant="a"))
    with pytest.raises(QueueFull, match="5 requests of yours"):
        engine.add(ask(base, "a5", tenant="a"))
    for i in range(3):
        engine.add(ask(base, f"b{i}", tenant="b"))
    with pytest.raises(QueueFull, match="8 requests are in flight"):
        engine.add(ask(base, "c0", tenant="c"))
    log = run(engine, until=lambda log: bool(log.last))
    ended = next(iter(log.last))
    engine.add(ask(base, "again", tenant=ended[0]))
    run(engine, log=log)
    assert log.last.keys() == {"a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2", "again"}


def test_200_that_wait_do_not_keep_another_tenants_5(base, new_engine):
    engine = new_engine(slots=8, queue=400, tenant_queue=400)
    for i in range(200):
        engine.add(ask(base, f"flood{i}", tenant="flood"))
    log = run(engine, until=lambda log: len(log.last) >= 4)
    for i in range(5):
        engine.add(ask(base, f"few{i}", tenant="few"))
    run(engine, until=lambda log: sum(id.startswith("few") for id in log.last) == 5, log=log)
    flood = sum(id.startswith("flood") for id in log.last)
    assert flood <= 4 + 24, "no more than those that ran, and as many again"
    for i in range(200):
        engine.cancel(f"flood{i}")
    run(engine, log=log)


def test_who_comes_with_many_at_once_shares_the_free_slots(base, new_engine):
    engine = new_engine(slots=4)
    for i in range(20):
        engine.add(ask(base, f"flood{i}", tenant="flood"))
    for i in range(2):
        engine.add(ask(base, f"few{i}", tenant="few"))
    log = run(engine, until=lambda log: "few1" in log.last)
    assert sum(id.startswith("flood") for id in log.last) <= 2
    run(engine, log=log)


def test_long_prompts_of_one_tenant_do_not_keep_anothers_short_one_from_being_read(base, new_engine):
    engine = new_engine(slots=8, step_tokens=16, prompt_tokens=16)
    for i in range(6):
        engine.add(ask(base, f"long{i}", GREEDY, text=f"{i}" + PROMPT * 3, tenant="flood"))
    log = Log()
    log.take(engine.step())
    engine.add(ask(base, "short", GREEDY, text="A cheese", tenant="few"))
    for _ in range(3):
        log.take(engine.step())
        assert len(engine.slots.step.positions) <= 16, "together they read no more than one alone"
    assert log.tokens["short"]
    run(engine, log=log)


def test_a_tenant_holds_no_more_slots_than_it_may_while_others_wait(base, new_engine):
    engine = new_engine(slots=4, tenant_slots=2)
    for tenant in "ab":
        for i in range(4):
            engine.add(ask(base, f"{tenant}{i}", tenant=tenant))
    log = Log()
    log.take(engine.step())
    assert sorted(s.tenant for s in engine._running) == ["a", "a", "b", "b"]
    run(engine, log=log)


def test_while_a_long_prompt_is_read_the_others_write_a_token_every_step(base, new_engine):
    engine = new_engine(slots=6, step_tokens=12, prompt_tokens=40)
    load(engine, base, *KINDS[:4])
    lines = [ask(base, f"w{i}", Sampling(60, temperature=0, ignore_end=True), KINDS[i], "A") for i in range(4)]
    log = run(engine, *lines, until=lambda log: all(len(log.tokens[line.id]) > 1 for line in lines))
    long = ask(base, "long", GREEDY, "lora", PROMPT * 4)
    engine.add(long)
    steps, rows = 0, []
    while not log.tokens["long"]:
        before = {line.id: len(log.tokens[line.id]) for line in lines}
        log.take(engine.step())
        rows.append(len(engine.slots.step.positions))
        assert all(len(log.tokens[id]) == count + 1 for id, count in before.items())
        steps += 1
    assert max(rows) <= 12
    assert steps == -(-len(long.prompt) // 8), "four write, eight are read"
    run(engine, log=log)


def test_while_nothing_is_written_more_is_read_at_once(base, new_engine):
    engine = new_engine(prompt_tokens=40, step_tokens=8)
    engine.add(ask(base, "x", GREEDY, text=PROMPT * 5))
    engine.step()
    assert len(engine.slots.step.positions) == 40
    run(engine)


# ------------------------------------------------------------------------------------------------------------- adapters


def test_who_asks_for_a_thousand_adapters_and_hangs_up_keeps_nobody_waiting(base, new_engine, adapters, monkeypatch):
    engine, gate, hung_up = new_engine(queue=1200, tenant_queue=1200), threading.Event(), threading.Event()
    unread, begun = engine.adapters._unread, []
    pop = unread.pop
    monkeypatch.setattr(unread, "pop", lambda: begun.append(held := pop()) or held)  # under the lock: as they begin
    for i in range(1000):
        opens = gate if i < 100 else hung_up
        adapters.special[f"lora-{i}"] = lambda opens=opens: opens.wait(60) and adapters.make("lora")
        engine.add(ask(base, f"flood{i}", GREEDY, f"lora-{i}", tenant="flood"))
    log = Log()
    log.take(engine.step())
    engine.add(ask(base, "few", GREEDY, "lora-two", tenant="few"))
    log.take(engine.step())
    gate.set()
    run(engine, until=lambda log: "few" in log.last, log=log)
    assert [held.ref.name for held in begun if held].index("lora-two") <= 3, "those that were being read, and one more"
    for i in range(1000):
        engine.cancel(f"flood{i}")
    log.take(engine.step())
    hung_up.set()
    all_read(engine)
    asked = len(adapters.asked)
    run(engine, ask(base, "last", GREEDY, "lora-new", tenant="few"), log=log)
    assert adapters.asked[asked:] == ["lora-new"]
    assert len(adapters.asked) < 1000


@pytest.mark.parametrize("tenant", ["many", "few"])
@pytest.mark.parametrize("places", [1, 2])
def test_steady_use_of_the_adapters_on_the_device_does_not_keep_another_from_it(base, new_engine, tenant, places):
    engine = new_engine(slots=4 * places, adapters=places)
    names, log, added = ["lora", "lora-two"][:places], Log(), 0
    load(engine, base, "lora-third", *names)
    while "x" not in log.last:
        while engine.in_flight() < 12 * places:
            short = Sampling(3 + added % 5, ignore_end=True)  # they do not all end in one step
            engine.add(ask(base, str(added), short, names[added % places], "A", "many"))
            added += 1
            if added == 20:
                engine.add(ask(base, "x", GREEDY, "lora-third", tenant=tenant))
        engine.wait(0.05)
        log.take(engine.step())
        assert added < 120, "it never ran"
    assert log.last["x"].reason == "length"
    run(engine, log=log)


def test_a_grammar_is_compiled_for_nobody_who_is_refused_anyway(base, new_engine):
    engine = new_engine(slots=1, queue=1, tenant_queue=0)
    engine.add(ask(base, "first"))
    wanted = Sampling(8, grammar=Grammar("json_schema", '{"type": "integer"}'))
    with pytest.raises(QueueFull, match="1 requests of yours"):
        engine.add(ask(base, "second", wanted))
    with pytest.raises(RequestError, match="is in flight"):
        engine.add(ask(base, "first", wanted))
    assert engine._made is None
    engine.add(ask(base, "third", wanted, tenant="u"))
    assert engine._made is not None
    run(engine)
