"""What one request is answered: its own text whatever the others do, to a stop, an end, a schema or a limit."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.engine.request import Grammar, Request, Sampling
from ftray.errors import RequestError
from ftray.model.served import Adapter
from ftray.registry.ref import Ref
from tests.engine.crowd import CONTEXT, GREEDY, KINDS, PROMPT, ask, crowd, run


@pytest.fixture(scope="module")
def theirs(base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()


# ----------------------------------------------------------------------------------------------------- what is answered


@pytest.mark.parametrize("kind", ["", "lora", "prompt"])
def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(base, new_engine, kind):
    sampling = Sampling(24, temperature=0.9, top_p=0.95, seed=7, presence_penalty=0.5, ignore_end=True)
    engine = new_engine(slots=12)
    alone = run(engine, ask(base, "x", sampling, kind)).tokens["x"]
    engine = new_engine(slots=12, step_tokens=20, reuse_prefixes=False)
    log = run(engine, *crowd(base, 7), until=lambda log: len(log.tokens["crowd0"]) > 1)
    run(engine, *(ask(base, f"{x}", sampling, kind, tenant=x) for x in "xyz"), log=log)
    assert log.tokens["x"] == log.tokens["y"] == log.tokens["z"] == alone
    other = run(engine, ask(base, "other", Sampling(24, temperature=0.9, seed=8, ignore_end=True), kind))
    assert other.tokens["other"] != alone


def test_without_a_seed_every_request_has_its_own(base, engine):
    log = run(engine, *(ask(base, str(i), Sampling(12, ignore_end=True)) for i in range(4)))
    assert len({tuple(tokens) for tokens in log.tokens.values()}) == 4


def test_the_text_ends_before_a_stop_string(base, engine):
    whole = run(engine, ask(base, "whole", Sampling(30, temperature=0, ignore_end=True))).text["whole"]
    for start, length in ((0, 1), (3, 2), (7, 6), (len(whole) - 4, 4)):
        stop = whole[start : start + length]
        log = run(engine, ask(base, "x", Sampling(40, temperature=0, stop=("never said", stop), ignore_end=True)))
        assert log.text["x"] == whole[: whole.find(stop)]
        assert log.last["x"].reason == "stop"
        assert log.last["x"].usage.completion_tokens < 40
    log = run(engine, ask(base, "x", Sampling(30, temperature=0, stop=(whole + "more",), ignore_end=True)))
    assert log.text["x"] == whole, "what could have been its beginning is told in the end"
    assert log.last["x"].reason == "length"


def test_a_stop_string_that_only_the_end_completes(base, engine):
    """The last token is half a character, which is known for none once nothing follows."""
    half = next(i for i in range(len(base.tokenizer)) if engine._detokenizer.bytes_of(i) == b"\xc3")
    log = run(engine, ask(base, "x", Sampling(1, temperature=0, logit_bias={half: 1e4}, stop=("\ufffd",))))
    assert (log.text["x"], log.last["x"].reason) == ("", "stop")
    log = run(engine, ask(base, "x", Sampling(1, temperature=0, logit_bias={half: 1e4})))
    assert (log.text["x"], log.last["x"].reason) == ("\ufffd", "length")


def test_the_end_token_ends_and_is_no_text(base, engine):
    end = base.tokenizer.eos_token_id
    log = run(engine, ask(base, "x", Sampling(9, temperature=0, logit_bias={end: 1e4})))
    assert (log.text["x"], log.tokens["x"], log.last["x"].reason) == ("", [end], "stop")
    log = run(engine, ask(base, "x", Sampling(9, temperature=0, logit_bias={end: 1e4}, ignore_end=True)))
    assert (log.tokens["x"], log.last["x"].reason) == ([end] * 9, "length")


def test_log_probabilities_are_those_of_the_base(base, engine, theirs):
    sampling = Sampling(12, temperature=0.7, seed=3, logprobs=4, ignore_end=True, repetition_penalty=1.3)
    request = ask(base, "x", sampling)
    log = run(engine, request, *crowd(base, 5))
    tokens, logprobs = log.tokens["x"], log.logprobs["x"]
    with torch.no_grad():
        table = (
            theirs(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        )
    assert [logprob.token for logprob in logprobs] == tokens
    for row, logprob in zip(table, logprobs, strict=True):
        assert abs(logprob.logprob - float(row[logprob.token])) < 1e-4
        best = row.topk(4)
        assert [token for token, _ in logprob.top] == best.indices.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in logprob.top]), best.values, rtol=0, atol=1e-4)
    assert not log.logprobs["crowd0"]


def test_answers_under_a_schema_parse(base, engine):
    schema = {
        "type": "object",
        "properties": {
            "cheese": {"enum": ["brie", "stilton", "käse"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
        },
        "required": ["cheese", "age", "tags"],
        "additionalProperties": False,
    }
    grammar = Grammar("json_schema", json.dumps(schema))
    vocabulary = range(len(base.tokenizer))
    likes = {i: -50.0 for i in vocabulary if engine._detokenizer.bytes_of(i).isspace()}  # or it goes on and on
    wanted = []
    for i, kind in enumerate(KINDS):
        sampling = Sampling(100, temperature=1.1, seed=i, grammar=grammar, logit_bias=likes)
        wanted.append(ask(base, f"x{i}", sampling, kind))
    log = run(engine, *wanted, *crowd(base, 5))
    for request in wanted:
        assert log.last[request.id].reason == "stop", log.text[request.id]
        jsonschema.validate(json.loads(log.text[request.id]), schema)
    assert len({log.text[request.id] for request in wanted}) > 3


# --------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("kind", ["", "lora", "prefix", "prompt"])
def test_an_answer_ends_where_the_slot_does(base, engine, kind):
    request = ask(base, "x", Sampling(1000, temperature=0, ignore_end=True), kind, PROMPT * 2)
    virtual = 9 if kind.startswith("pr") else 0
    log = run(engine, request, ask(base, "one", Sampling(1, temperature=0, ignore_end=True), kind))
    assert log.last["x"].reason == log.last["one"].reason == "length"
    assert len(log.tokens["x"]) == CONTEXT - virtual - len(request.prompt)
    assert len(log.tokens["one"]) == 1


def test_the_longest_prompt(base, engine):
    longest = tuple(range(10, 10 + CONTEXT - 1))
    log = run(engine, Request("x", longest, GREEDY))
    assert (len(log.tokens["x"]), log.last["x"].reason) == (1, "length")
    with pytest.raises(RequestError, match=r"the prompt has 128 tokens; .* 127"):
        engine.add(Request("x", (*longest, 5), GREEDY))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("extra", [-1, 0, 60])
def test_virtual_tokens_count(base, engine, kind, extra):
    """That an adapter leaves too little room shows only once it is read."""
    prompt = tuple(range(10, 10 + CONTEXT - 9 + extra))[: CONTEXT - 1]
    log = run(engine, Request("x", prompt, GREEDY, Ref("t", kind, kind)), ask(base, "other"))
    if extra < 0:
        assert (log.last["x"].reason, len(log.tokens["x"])) == ("length", 1)
    else:
        error = log.last["x"].error
        assert isinstance(error, RequestError)
        assert f"{len(prompt)} tokens and its adapter 9" in error.what
        assert log.tokens["x"] == []
    assert log.last["other"].reason == "length"


def test_an_adapter_of_more_virtual_tokens_than_a_slot_has_places(base, engine, adapters):
    config = base.config
    adapters.special["prefix"] = Adapter(
        {}, {}, prefix=torch.ones(config.num_hidden_layers, 2, config.num_key_value_heads, CONTEXT + 70, 32)
    )
    log = run(engine, ask(base, "x", GREEDY, "prefix"), ask(base, "other"))
    assert isinstance(log.last["x"].error, RequestError)
    assert log.last["other"].error is None
