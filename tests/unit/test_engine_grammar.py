"""Text under a grammar: whatever the base says, a finished answer parses, and holds to its schema."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftray import embedded
from ftray.engine.choice import Choice
from ftray.engine.grammar import MAX_SCHEMA_BYTES, Grammars, fill_masks
from ftray.engine.request import Grammar, Sampling
from ftray.engine.sampling import Sampler
from ftray.engine.text import Detokenizer, TextStream
from ftray.errors import RequestError, RunError
from tests.unit.test_engine_text import tokenizer as made

ANY = Grammar("json")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ripe", "blue", "käse"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["embedded", "llama", "byte level"])
def base(request) -> tuple[PreTrainedTokenizerBase, Grammars, int]:
    """(tokenizer, its grammars, number of logits: more than there are tokens)."""
    if request.param == "llama":
        folder = request.getfixturevalue("ftray_data") / "weights" / "stories260K-llama"
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = _embedded() if request.param == "embedded" else made(request.param)
    vocabulary = len(tokenizer) + 61
    return tokenizer, Grammars(tokenizer, vocabulary, [tokenizer.eos_token_id]), vocabulary


@functools.cache
def _embedded() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(embedded.base_path())


def _answer(base, grammar: Grammar, seed: int, max_tokens: int = 150, **asked) -> tuple[str, str]:
    """(what a model of random weights that likes closing quotes and brackets says, why it ended)."""
    tokenizer, grammars, vocabulary = base
    sampling = Sampling(max_tokens=max_tokens, seed=seed, grammar=grammar, **asked)
    choice = Choice(sampling, [1], vocabulary, [tokenizer.eos_token_id], grammars.matcher(grammar))
    stream, text = TextStream(Detokenizer(tokenizer)), ""
    random = torch.Generator().manual_seed(seed)
    liked = torch.zeros(vocabulary)
    for word in ('"', "}", "]", "<0x22>", "<0x7D>", "<0x5D>"):
        if (token := tokenizer.get_vocab().get(word)) is not None:
            liked[token] = 4
    while True:
        [chosen] = Sampler().choose(torch.randn(1, vocabulary, generator=random) * 2 + liked, [choice])
        assert chosen.error is None, chosen.error
        if not chosen.is_end:
            text += stream.add(chosen.token)
        if chosen.finish:
            return text + stream.finish(), chosen.finish


@pytest.mark.parametrize("kind", ["json", "person"])
def test_a_finished_answer_parses(base, kind):
    grammar = ANY if kind == "json" else Grammar("json_schema", json.dumps(PERSON))
    finished = 0
    for seed in range(30):
        text, reason = _answer(base, grammar, seed, temperature=0 if seed % 3 == 0 else 1.0, top_p=0.9)
        if reason == "length":
            continue
        finished += 1
        value = json.loads(text)
        assert isinstance(value, dict)
        if kind == "person":
            jsonschema.validate(value, PERSON)
    assert finished >= 10


def test_an_answer_cut_by_its_length_says_so(base):
    text, reason = _answer(base, ANY, seed=0, max_tokens=3)
    assert reason == "length"
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)


def _allowed(base, matcher) -> set[int]:
    masks, [error] = fill_masks([matcher])
    assert error is None
    return set(np.flatnonzero(np.unpackbits(masks[0], bitorder="little")).tolist())


def test_only_tokens_that_can_go_on_are_allowed_and_the_end_once_complete(base):
    tokenizer, grammars, _ = base
    matcher = grammars.matcher(Grammar("json_schema", '{"type": "integer"}'))
    detokenizer = Detokenizer(tokenizer)
    by_bytes = {detokenizer.bytes_of(i): i for i in reversed(range(len(tokenizer)))}
    end = tokenizer.eos_token_id
    assert end not in _allowed(base, matcher)
    assert matcher.accept(by_bytes[b"7"]) is None
    allowed = _allowed(base, matcher)
    assert end in allowed, "7 is an integer"
    assert by_bytes[b"1"] in allowed, "and so is 71"
    assert by_bytes[b"a"] not in allowed
    assert not matcher.complete
    assert matcher.accept(end) is None
    assert matcher.complete


def test_special_and_unknown_tokens_are_never_allowed(base):
    tokenizer, grammars, _ = base
    matcher = grammars.matcher(Grammar("json_schema", '{"type": "string"}'))
    quote = next(i for i in range(len(tokenizer)) if Detokenizer(tokenizer).bytes_of(i) == b'"')
    matcher.accept(quote)
    allowed = _allowed(base, matcher)
    assert len(allowed) > 50
    assert not allowed & set(tokenizer.all_special_ids)
    assert max(allowed) < len(tokenizer)


def test_the_value_ends_the_answer_without_an_end_token(base):
    text, reason = _answer(base, Grammar("json_schema", '{"const": {"a": 1}}'), seed=1)
    assert reason == "stop"
    assert json.loads(text) == {"a": 1}


def test_a_grammar_ends_even_where_the_end_token_is_ignored(base):
    text, reason = _answer(base, Grammar("json_schema", '{"const": [1, 2]}'), seed=1, ignore_end=True)
    assert reason == "stop"
    assert json.loads(text) == [1, 2]


BAD = {
    "not JSON": "{",
    "a list": "[1]",
    "an unknown type": '{"type": "objekt"}',
    "a broken pattern": '{"type": "string", "pattern": "((("}',
    "an outside reference": '{"$ref": "http://example.org/schema"}',
    "a missing reference": '{"$ref": "#/$defs/no"}',
    "nothing that fits": '{"enum": []}',
    "false": "false",
    "what is not built": '{"not": {"type": "string"}}',
    "deep nesting": '{"items":' * 5000 + "{}" + "}" * 5000,
    "a long schema": json.dumps({"description": "x" * MAX_SCHEMA_BYTES}),
    "an endless union": json.dumps(
        {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(30)]}
    ),
    "an endless number": json.dumps({"type": "integer", "multipleOf": 999983, "minimum": 1, "maximum": 10**15}),
}


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_cannot_be_held_to_is_refused_at_once(name):
    grammars = _shared()
    start = time.process_time()  # of all threads that llguidance may have
    with pytest.raises(RequestError) as refusal:
        grammars.matcher(Grammar("json_schema", BAD[name]))
    assert refusal.value.where == "json_schema"
    assert len(str(refusal.value)) < 500
    assert time.process_time() - start < 30
    assert _allowed_start(grammars), "the next one is not concerned"


@functools.cache
def _shared() -> Grammars:
    return Grammars(_embedded(), 2048, [2])


def _allowed_start(grammars: Grammars) -> bool:
    masks, errors = fill_masks([grammars.matcher(ANY)])
    return bool(masks.any()) and errors == [None]


def test_true_is_any_value():
    masks, errors = fill_masks([_shared().matcher(Grammar("json_schema", text)) for text in ("true", "{}")])
    assert errors == [None, None]
    assert (masks[0] == masks[1]).all()


def test_large_schemas_are_compiled_in_bounded_time():
    doubled: dict = {"type": "string"}
    for _ in range(9):
        doubled = {"type": "object", "properties": {"a": doubled, "b": doubled}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1900)}}
    for schema in (doubled, wide, {"enum": [f"x{i}" for i in range(7000)]}):
        text = json.dumps(schema)
        assert len(text) <= MAX_SCHEMA_BYTES
        start = time.process_time()
        _shared().matcher(Grammar("json_schema", text))
        assert time.process_time() - start < 30


def test_a_grammar_that_grows_too_large_fails_its_own_row_alone():
    grammars = _shared()
    heavy = Grammar("json_schema", json.dumps({"type": "string", "pattern": "(.*a.{30}){5}"}))
    a, b, quote = _embedded().convert_tokens_to_ids(["a", "b", '"'])
    sampling = {"max_tokens": 10**6, "temperature": 0.0}

    def valid_json() -> Choice:
        return Choice(Sampling(**sampling, grammar=ANY), [1], 2048, [2], grammars.matcher(ANY))

    choices = [
        Choice(Sampling(**sampling, grammar=heavy), [1], 2048, [2], grammars.matcher(heavy)),
        valid_json(),
        Choice(Sampling(**sampling), [1], 2048, [2]),
    ]
    random = torch.Generator().manual_seed(0)
    for step in range(300):
        logits = torch.randn(3, 2048, generator=random)
        logits[0, quote if step == 0 else [a, b][int(torch.randint(2, (), generator=random))]] += 100
        first, second, third = Sampler().choose(logits, choices)
        assert second.error is third.error is None
        if first.error is not None:
            break
        if second.finish:
            choices[1] = valid_json()
    assert isinstance(first.error, RunError)
    assert first.token == -1


def test_white_space_does_not_go_on_for_ever():
    matcher = _shared().matcher(ANY)
    words = {word: _embedded().convert_tokens_to_ids(word) for word in ("{", "Ġ")}
    assert matcher.accept(words["{"]) is None
    accepted = 0
    while matcher.accept(words["Ġ"]) is None:
        accepted += 1
        assert accepted < 100
    assert accepted >= 16, "room to indent"


def test_a_grammar_is_compiled_once_and_its_answers_do_not_meet():
    grammars = Grammars(_embedded(), 2048, [2])
    grammar = Grammar("json_schema", json.dumps(PERSON))
    open_brace = _embedded().convert_tokens_to_ids("{")
    with ThreadPoolExecutor(4) as pool:
        matchers = list(pool.map(lambda _: grammars.matcher(grammar), range(16)))
    assert matchers[0].accept(open_brace) is None
    masks, errors = fill_masks(matchers)
    assert errors == [None] * 16
    assert (masks[1:] == masks[1]).all()
    assert (masks[0] != masks[1]).any()
    start = time.thread_time()
    for _ in range(100):
        grammars.matcher(grammar)
    assert time.thread_time() - start < 3


@pytest.mark.parametrize("kind", ["metaspace", "word piece"])
def test_a_tokenizer_without_bytes_serves_without_grammars(kind):
    grammars = Grammars(made(kind), len(made(kind)), [made(kind).eos_token_id])
    with pytest.raises(RequestError, match="has no grammars"):
        grammars.matcher(ANY)


def test_added_tokens_that_are_text_are_text():
    tokenizer = AutoTokenizer.from_pretrained(embedded.base_path())
    tokenizer.add_tokens([AddedToken('{"ready": true}', normalized=False)])
    grammars = Grammars(tokenizer, len(tokenizer), [2])
    matcher = grammars.matcher(ANY)
    assert matcher.accept(len(tokenizer) - 1) is None
    assert matcher.complete
