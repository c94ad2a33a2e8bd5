"""Requests cancelled at any moment: each gets one end, and everything is given back."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from typing import Any

from ftray.errors import ArtefactError
from tests.engine.crowd import GREEDY, KINDS, PROMPT, Log, ask, run


def test_cancelled_while_it_waits(base, new_engine):
    engine = new_engine(slots=1)
    engine.add(ask(base, "first"))
    engine.add(ask(base, "second", GREEDY, "lora"))
    log = Log()
    log.take(engine.step())
    engine.cancel("second")
    engine.cancel("second")
    engine.cancel("unknown")
    run(engine, log=log)
    assert (log.last["second"].reason, log.tokens["second"]) == ("cancelled", [])
    assert len(log.tokens["first"]) == 16


def test_cancelled_before_the_engine_has_looked(base, engine):
    engine.add(ask(base, "x", GREEDY, "lora"))
    engine.cancel("x")
    assert [(event.id, event.reason) for event in engine.step()] == [("x", "cancelled")]
    engine.cancel("x")
    assert len(run(engine, ask(base, "x")).tokens["x"]) == 16, "the last one's cancellation is not this one's"


def test_cancelled_in_the_step_that_ends_it(base, engine, monkeypatch):
    choose, log = engine._sampler.choose, Log()

    def slowly(*arguments: Any) -> Any:
        engine.cancel("x")  # another thread's, while the last token is chosen
        return choose(*arguments)

    run(engine, ask(base, "x"), until=lambda log: len(log.tokens["x"]) == 15, log=log)
    monkeypatch.setattr(engine._sampler, "choose", slowly)
    log.take(engine.step())
    monkeypatch.undo()
    assert log.last["x"].reason == "length"
    assert run(engine, ask(base, "x")).last["x"].reason == "length", "it was not meant"


def test_cancelled_while_its_adapter_is_read(base, engine, adapters):
    gate = threading.Event()
    adapters.special["slow"] = lambda: gate.wait(60) and adapters.make("slow")
    engine.add(ask(base, "x", GREEDY, "slow"))
    engine.add(ask(base, "y", GREEDY, "slow"))
    log = Log()
    log.take(engine.step())
    engine.cancel("x")
    log.take(engine.step())
    assert log.last["x"].reason == "cancelled"
    assert engine.stats().adapter_users == 1
    gate.set()
    run(engine, log=log)
    assert len(log.tokens["y"]) == 16
    assert adapters.asked == ["slow"]


def test_cancelled_while_it_reads_and_while_it_writes(base, new_engine):
    engine = new_engine(prompt_tokens=8, step_tokens=8)
    log = Log()
    engine.add(ask(base, "writes", GREEDY, "lora", "A"))
    engine.add(ask(base, "reads", GREEDY, "lora", PROMPT * 8))
    while len(log.tokens["writes"]) < 3:
        log.take(engine.step())
    reading = engine._by_id["reads"]
    assert 0 < reading.done < len(reading.tokens) - 8
    engine.cancel("reads")
    engine.cancel("writes")
    log.take(engine.step())
    assert {event.reason for event in log.last.values()} == {"cancelled"}
    assert 3 <= len(log.tokens["writes"]) < 16
    assert engine.in_flight() == 0


def test_300_requests_cancelled_at_random(base, new_engine, adapters):
    """Whenever it comes, everybody gets one end, and everything is given back."""
    adapters.special["broken"] = ArtefactError("broken")
    adapters.special["lora-two"] = lambda: time.sleep(0.02) or adapters.make("lora-two")
    engine = new_engine(
        slots=8, adapters=3, adapter_memory=1 << 16, step_tokens=24, prompt_tokens=40, queue=400, tenant_queue=400
    )
    choose, log = random.Random(5), Log()
    requests = [
        ask(base, str(i), GREEDY, choose.choice([*KINDS, "broken"]), PROMPT * choose.choice([1, 1, 3]), f"t{i % 4}")
        for i in range(300)
    ]
    arriving = {i: requests[3 * i : 3 * i + 3] for i in range(100)}
    cancelling = defaultdict(list)
    for request in choose.sample(requests, 240):
        cancelling[int(request.id) // 3 + choose.randrange(40)].append(request.id)
    step = 0
    while engine.in_flight() or step < 150:
        for request in arriving.get(step, []):
            engine.add(request)
        for id in cancelling[step]:
            engine.cancel(id)
        log.take(engine.step())
        step += 1
    assert log.last.keys() == {request.id for request in requests}
    reasons = defaultdict(int)
    for request in requests:
        last = log.last[request.id]
        reasons[last.reason] += 1
        name = request.adapter.name if request.adapter else None
        assert (last.reason == "error") <= (name == "broken")
        assert (last.reason == "length") == (len(log.tokens[request.id]) == 16)
    assert reasons["cancelled"] > 100
    assert reasons["length"] > 30
    by_content: dict[Any, set[tuple[int, ...]]] = defaultdict(set)
    for request in requests:  # of one adapter and prompt, all say the same, as far as they come
        by_content[request.adapter, request.prompt].add(tuple(log.tokens[request.id]))
    for answers in by_content.values():
        longest = max(answers, key=len)
        assert all(longest[: len(answer)] == answer for answer in answers)
