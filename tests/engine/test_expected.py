"""Answers that are expected: how probable they are, and that nothing else changes; beginnings that are read once."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftray.engine.request import Request, Sampling
from ftray.errors import RequestError
from ftray.evaluate.losses import LossRow, row_losses
from tests.engine.crowd import CONTEXT, GREEDY, KINDS, PROMPT, ask, crowd, run, tokens_of

SAMPLINGS = {
    "greedy": {"temperature": 0},
    "with an end": {"temperature": 0, "ignore_end": False, "max_tokens": 40},
    "with a stop": {"temperature": 0, "stop": ("e",), "max_tokens": 40},
    "drawn": {"temperature": 1.3},
    "drawn from few": {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "with penalties": {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
    "with log probabilities": {"temperature": 0, "logprobs": 2},
}


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("pieces", [None, 9])
def test_whatever_is_expected_the_answer_stays(base, new_engine, sampling, pieces):
    """What is expected is the answer, begins as it does, or is something else; prompts are read whole or in pieces."""
    engine = new_engine(slots=5, prompt_tokens=pieces, step_tokens=pieces)
    requests = crowd(base, 24, **SAMPLINGS[sampling])
    alone = run(engine, *requests)
    rng = random.Random(0)
    expecting = []
    for request in requests:
        right = alone.tokens[request.id]
        some = [right, [*right, 7, 8], right[: len(right) // 2], [*right[:3], 5, *right[4:]], [9, *right]]
        expecting.append(replace(request, id=f"{request.id}+", expected=tuple(rng.choice(some))))
    found = run(engine, *expecting)
    for request in expecting:
        before = request.id[:-1]
        assert found.tokens[request.id] == alone.tokens[before], (found.last[request.id], alone.last[before])
        assert found.text[request.id] == alone.text[before]
        assert found.last[request.id].reason == alone.last[before].reason
        assert len(found.last[request.id].expected) == len(request.expected)
        told = [(each.token, pytest.approx(each.logprob, abs=1e-3)) for each in alone.logprobs[before]]
        assert [(each.token, each.logprob) for each in found.logprobs[request.id]] == told


@pytest.mark.parametrize("pieces", [None, 8])
def test_how_probable_it_is(base, new_engine, adapters, pieces):
    """As a pass over prompt and answer says, which the losses of evaluation come from."""
    engine = new_engine(slots=4, prompt_tokens=pieces, step_tokens=pieces)
    answer = tokens_of(base, " Bless the cheese, my friend.")[1:]
    requests = [
        replace(ask(base, str(i), Sampling(1 + i % 3, temperature=0), kind), expected=answer[: 1 + i])
        for i, kind in enumerate(KINDS * 2)
    ]
    found = run(engine, *requests)
    engine.close()
    made = {kind: adapters.make(kind) for kind in KINDS if kind}
    rows = []
    for request in requests:
        tokens = np.array([*request.prompt, *request.expected], np.int32)
        targets = np.arange(len(tokens)) >= len(request.prompt)
        rows.append(LossRow(request.adapter.digest if request.adapter else None, tokens, targets))
    losses = row_losses(base, made, rows)
    for request, loss in zip(requests, losses, strict=True):
        assert -sum(found.last[request.id].expected) == pytest.approx(loss, rel=1e-4)


def test_an_answer_that_was_right_takes_no_steps(base, new_engine):
    engine = new_engine(prompt_tokens=256)
    right = run(engine, ask(base, "a")).tokens["a"]
    steps = engine.stats().steps
    run(engine, replace(ask(base, "b", text=PROMPT, tenant="u"), expected=tuple(right)))
    assert engine.stats().steps == steps + 1


def test_what_was_expected_in_vain_serves_nobody(base, new_engine):
    """Keys and values of what was not written must not be taken for the answer's."""
    engine = new_engine(slots=1)
    request = replace(ask(base, "a"), expected=tuple(range(300, 316)))
    first = run(engine, request).tokens["a"]
    more = Request("b", (*request.prompt, *request.expected, 9), GREEDY, None, "t")
    log = run(engine, more)
    assert log.last["b"].usage.cached_tokens == len(request.prompt)
    again = run(engine, replace(more, id="c", tenant="u"))
    assert again.last["c"].usage.cached_tokens == 0
    assert log.tokens["b"] == again.tokens["c"]
    assert len(first) == 16


def test_cancelled_while_it_is_read(base, new_engine):
    engine = new_engine(prompt_tokens=8, step_tokens=8)
    engine.add(replace(ask(base, "a", text="A"), expected=tuple(range(300, 340))))
    for _ in range(3):
        assert engine.step() == []
    engine.cancel("a")
    log = run(engine)
    assert log.last["a"].reason == "cancelled"
    assert log.last["a"].usage.completion_tokens == 0
    assert log.last["a"].expected == ()


def test_expected_in_vain(base, new_engine, adapters):
    engine = new_engine()
    with pytest.raises(RequestError, match="vocabulary"):
        engine.add(replace(ask(base, "a"), expected=(1, 1 << 20)))
    log = run(engine, replace(ask(base, "b"), expected=tuple(range(300, 300 + CONTEXT))))
    assert log.last["b"].reason == "error"
    assert "tokens" in str(log.last["b"].error)
    adapters.special["bad"] = adapters.make("lora", float("nan"))
    log = run(engine, replace(ask(base, "c", adapter="bad"), expected=(5, 6)), replace(ask(base, "d"), expected=(5,)))
    assert log.last["c"].reason == "error"
    assert len(log.tokens["d"]) == 16


# --------------------------------------------------------------------------------------------------- read at once, once


@pytest.mark.parametrize("kind", ["", "lora", "prefix", "prompt"])
def test_many_that_begin_alike_read_their_beginning_once(base, new_engine, kind):
    def wanted(tenant: str) -> list[Request]:
        first = ask(base, f"{tenant}0", GREEDY, kind, PROMPT * 2, tenant)
        tails = [(40 + i, 50 + i) for i in range(5)]
        return [first, *(replace(first, id=f"{tenant}{i + 1}", prompt=first.prompt + t) for i, t in enumerate(tails))]

    engine = new_engine(slots=6, prompt_tokens=16, step_tokens=16)
    together = run(engine, *wanted("t"))
    whole = len(ask(base, "x", text=PROMPT * 2).prompt)
    assert [together.last[f"t{i}"].usage.cached_tokens for i in range(6)] == [0] + 5 * [whole]
    apart = new_engine(slots=6, reuse_prefixes=False)
    alone = run(apart, *wanted("t"))
    assert together.tokens == alone.tokens
    assert {end.usage.cached_tokens for end in alone.last.values()} == {0}


def test_nobody_waits_for_another_tenants_beginning(base, new_engine):
    engine = new_engine(prompt_tokens=16, step_tokens=16)
    requests = [ask(base, f"{t}{i}", GREEDY, "", PROMPT * 2, t) for t in "tu" for i in range(2)]
    for request in requests:
        engine.add(request)
    engine.step()
    assert {sequence.id for sequence in engine._running} == {"t0", "u0"}
    log = run(engine)
    assert len({tuple(tokens) for tokens in log.tokens.values()}) == 1
    assert [log.last[request.id].usage.cached_tokens > 0 for request in requests] == [False, True] * 2


def test_who_waits_for_a_beginning_keeps_a_slot_from_other_tenants(base, new_engine):
    """Slots go to others as if those that wait had theirs."""
    engine = new_engine(prompt_tokens=16, step_tokens=16)
    alike = [ask(base, f"t{i}", GREEDY, "", PROMPT * 2, "t") for i in range(2)]
    for request in [*alike, *(ask(base, f"u{i}", GREEDY, "", PROMPT[i:] * 2, "u") for i in range(6))]:
        engine.add(request)
    engine.step()
    assert {sequence.id for sequence in engine._running} == {"t0", "u0", "u1"}
    log = run(engine, until=lambda log: "t1" in log.tokens)
    assert not log.last, "it got its slot before anybody had ended"
    run(engine, log=log)
    assert len(log.last) == 8


def test_what_is_expected_in_vain_spoils_nothing(base, new_engine, monkeypatch):
    """Values that are no numbers, of expected tokens alone."""
    engine = new_engine(slots=1)
    right = run(engine, ask(base, "a")).tokens["a"]
    judge = engine._judge

    def spoiled(logits, sampled):
        for sequence in sampled:
            for values in engine.slots.values:
                values[0, sequence.slot, :, sequence.begin :] = torch.nan
            logits[sampled[sequence] + 1] = torch.nan
        judge(logits, sampled)

    monkeypatch.setattr(engine, "_judge", spoiled)
    log = run(engine, replace(ask(base, "b", tenant="u"), expected=(300, 301)))
    assert log.tokens["b"] == right
    monkeypatch.undo()
    assert run(engine, ask(base, "c", tenant="v")).tokens["c"] == right


def test_who_waited_goes_on_when_the_reader_is_cancelled(base, new_engine):
    engine = new_engine(prompt_tokens=8, step_tokens=8)
    long = ask(base, "a", text=PROMPT * 3)
    engine.add(long)
    engine.add(replace(long, id="b"))
    engine.step()
    assert [sequence.id for sequence in engine._running] == ["a"]
    engine.cancel("a")
    log = run(engine)
    assert log.last["a"].reason == "cancelled"
    assert log.last["b"].reason == "length"
    assert torch.tensor(log.tokens["b"]).shape == (16,)
