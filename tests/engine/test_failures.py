"""What breaks costs its own requests alone: adapters full of nonsense, broken ones, steps that fail."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ftray.engine.engine import Engine
from ftray.errors import ArtefactError, FtrayError, RunError
from ftray.model.pooled import Delta
from ftray.model.served import Adapter, Base
from tests.engine.crowd import GREEDY, KINDS, PROMPT, ask, load, run


def answers(engine: Engine, base: Base, prompts: Iterable[str] = ("A", PROMPT), kind: str = "") -> list[list[int]]:
    """Of new tenants, so that nothing is found in slots."""
    requests = [ask(base, f"probe{i}", GREEDY, kind, text, f"probe{i}") for i, text in enumerate(prompts)]
    log = run(engine, *requests)
    assert all(log.last[request.id].error is None for request in requests)
    return [log.tokens[request.id] for request in requests]


@pytest.mark.parametrize(
    ("kind", "fill"),
    [(kind, float(fill)) for kind in ("lora", "prefix", "prompt", "bottleneck") for fill in ("nan", "inf")]
    + [("lora", 1e38)],
)
def test_an_adapter_full_of_nonsense_fails_alone(base, new_engine, adapters, kind, fill):
    engine = new_engine(slots=3)
    expected = answers(engine, base), answers(engine, base, kind=KINDS[1])
    adapters.special[f"{kind}-bad"] = adapters.make(kind, fill)
    bad = [ask(base, f"bad{i}", GREEDY, f"{kind}-bad", PROMPT * (1 + i)) for i in range(3)]
    good = ask(base, "good", GREEDY, "lora-two")
    alone = run(new_engine(slots=3), good).tokens["good"]
    engine = new_engine(slots=3)
    log = run(engine, good, *bad)
    assert log.tokens["good"] == alone
    for request in bad:
        error = log.last[request.id].error
        assert isinstance(error, RunError)
        assert "not a number" in error.what
        assert log.tokens[request.id] == []
    assert (answers(engine, base), answers(engine, base, kind=KINDS[1])) == expected, "in the same slots, afterwards"
    assert engine.stats().adapter_users == 0


def test_nan_of_one_that_was_cancelled_reaches_nobody_either(base, new_engine, adapters):
    engine = new_engine(slots=1, prompt_tokens=16)
    expected = answers(engine, base)
    adapters.special["bad"] = adapters.make("lora", float("nan"))
    engine.add(ask(base, "x", GREEDY, "bad", PROMPT * 3))
    run(engine, until=lambda _: engine._by_id["x"].done > 20 if "x" in engine._by_id else False)
    engine.cancel("x")
    run(engine)
    assert answers(engine, base) == expected


def test_a_step_that_fails_costs_the_requests_that_were_in_it(base, new_engine, monkeypatch):
    engine = new_engine(slots=2)
    expected = answers(engine, base)
    load(engine, base, KINDS[1])
    log = run(
        engine, *(ask(base, f"x{i}", GREEDY, KINDS[i]) for i in range(2)), until=lambda log: len(log.tokens["x0"]) > 2
    )
    engine.add(ask(base, "waits"))
    with monkeypatch.context() as patch:
        patch.setattr(base.model, "forward", lambda **_: 1 / 0)
        log.take(engine.step())
    for id in ("x0", "x1"):
        error = log.last[id].error
        assert isinstance(error, RunError)
        assert "ZeroDivisionError" in error.what
        assert isinstance(error.__cause__, ZeroDivisionError)
    assert "waits" not in log.last
    run(engine, log=log)
    assert log.last["waits"].reason == "length"
    assert log.last["waits"].usage.cached_tokens == 0, "what the failed step wrote is not used again"
    assert answers(engine, base) == expected
    assert base.pooled.router.route is None


def test_a_broken_adapter_costs_its_own_requests_alone(base, engine, adapters):
    adapters.special |= {"broken": ArtefactError("broken", where="t/broken"), "odd": OSError("disk")}
    adapters.special["misfit"] = Adapter({"nowhere": Delta()}, {})
    wanted = [ask(base, f"{kind}{i}", GREEDY, kind) for i in range(3) for kind in ("broken", "lora", "odd", "misfit")]
    log = run(engine, *wanted, ask(base, "plain"))
    for request in wanted:
        error = log.last[request.id].error
        assert (error is None) == (request.adapter.name == "lora")
        assert error is None or isinstance(error, ArtefactError)
    assert log.last["plain"].reason == "length"
    assert log.last["broken0"].error is adapters.special["broken"]
    assert sorted(set(adapters.asked)) == sorted(adapters.asked), "each was asked for once"
    assert engine.stats().adapter_failures == 3


def test_errors_reach_other_processes(base, engine, adapters):
    import pickle

    adapters.special["bad"] = adapters.make("lora", float("nan"))
    last = run(engine, ask(base, "x", GREEDY, "bad")).last["x"]
    again = pickle.loads(pickle.dumps(last))
    assert isinstance(again.error, FtrayError)
    assert (again.id, again.reason, again.usage, str(again.error)) == (
        last.id,
        last.reason,
        last.usage,
        str(last.error),
    )
