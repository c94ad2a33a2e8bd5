"""What every request is promised, whatever the others do: its own text, one end, and nothing left behind."""

from __future__ import annotations

import gc
import json
import random
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from ftray.config import Model
from ftray.engine.engine import Engine, load_base
from ftray.engine.options import EngineOptions
from ftray.engine.request import Event, Finished, Grammar, Logprob, Request, Sampling
from ftray.errors import ArtefactError, FtrayError, QueueFull, RequestError, RunError
from ftray.model.pooled import Bottleneck, Delta
from ftray.model.served import Adapter, Base
from ftray.registry.ref import Ref

CONTEXT = 128
GREEDY = Sampling(16, temperature=0, ignore_end=True)
PROMPT = "What is a good cheese for a picnic?"

# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(Model(path="embedded"), quantized=False, dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(base) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()


class Adapters:
    """Random ones, strong enough to change every text; by the name of a Ref, of any version. What a test puts into
    `special` is given, called or raised instead."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.special: dict[str, Any] = {}
        self.asked: list[str] = []

    def load(self, ref: Ref) -> Adapter:
        self.asked.append(ref.digest)
        made = self.special.get(ref.name) or self.special.get(ref.digest)
        if isinstance(made, Exception):
            raise made
        if isinstance(made, Adapter):
            return made
        return made() if made else self.make(ref.digest)

    def make(self, name: str, fill: float | None = None) -> Adapter:
        """Of the kind that its name begins with."""
        generator = torch.Generator().manual_seed(sum(map(ord, name)))

        def normal(*shape: int, width: float) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * width if fill is None else torch.full(shape, fill)

        config, linears = self.base.config, self.base.pooled.linears
        if name.startswith("prefix"):
            shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 9, 32)
            return Adapter({}, {}, prefix=normal(*shape, width=1))
        if name.startswith("prompt"):
            return Adapter({}, {}, prompt=normal(9, config.hidden_size, width=0.5))
        if name.startswith("bottleneck"):
            size, hidden = 6, config.hidden_size
            parts = normal(size, hidden, width=0.1), normal(size, width=0.1), normal(size, hidden, width=0.3)
            return Adapter({}, {"model.layers.1.mlp": Bottleneck(*parts, normal(hidden, width=0.1), "gelu")})
        rank = 2 + len(name)
        return Adapter(
            {
                path: Delta(normal(rank, layer.inputs, width=0.1), normal(rank, layer.outputs, width=0.1))
                for path, layer in linears.items()
                if path.endswith(("v_proj", "down_proj"))
            },
            {},
        )


@pytest.fixture
def adapters(base) -> Adapters:
    return Adapters(base)


@pytest.fixture
def new_engine(base, adapters):
    """Engines one at a time; at the end of a test nothing may be left in the last one."""
    made: list[Engine] = []

    def new(**options: Any) -> Engine:
        if made:
            made[-1].close()
        made.append(Engine(base, adapters.load, EngineOptions(**({"slots": 4, "context": CONTEXT} | options))))
        return made[-1]

    yield new
    try:
        nothing_is_left(made[-1])
    finally:
        made[-1].close()
    assert base.pooled.nbytes == 0


@pytest.fixture
def engine(new_engine) -> Engine:
    return new_engine()


def nothing_is_left(engine: Engine) -> None:
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.adapter_users, engine.in_flight()) == (0, 0, 0, 0)
    assert sorted(engine._table.free) == list(range(stats.slots))
    assert not engine._by_id
    assert not engine._running
    assert not engine._cancelled
    assert not engine._of_tenant
    assert len(engine._queue) == 0
    assert not engine._queue._served
    assert all(not held.running for held in engine.adapters._held.values())


class Log:
    """What happened, by request."""

    def __init__(self) -> None:
        self.text: dict[str, str] = defaultdict(str)
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.logprobs: dict[str, list[Logprob]] = defaultdict(list)
        self.last: dict[str, Finished] = {}

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            assert event.id not in self.last, "nothing follows the last event"
            if isinstance(event, Finished):
                self.last[event.id] = event
                assert event.usage.completion_tokens == len(self.tokens[event.id])
                assert (event.error is not None) == (event.reason == "error")
            else:
                self.text[event.id] += event.text
                self.tokens[event.id] += event.tokens
                self.logprobs[event.id] += event.logprobs


def run(engine: Engine, *requests: Request, until: Callable[[Log], bool] | None = None, log: Log | None = None) -> Log:
    """Add them all, and step until all in flight have ended, or `until` holds."""
    log = log or Log()
    for it in requests:
        engine.add(it)
    end = time.monotonic() + 60
    while engine.in_flight() and not (until and until(log)):
        engine.wait(0.05)
        log.take(engine.step())
        assert time.monotonic() < end
    return log


def tokens_of(base: Base, text: str) -> tuple[int, ...]:
    return tuple(base.tokenizer(text).input_ids)


def ask(
    base: Base, id: str, sampling: Sampling = GREEDY, adapter: str = "", text: str = PROMPT, tenant: str = "t"
) -> Request:
    ref = Ref("t", adapter.split("@")[0], adapter) if adapter else None
    return Request(id, tokens_of(base, text), sampling, ref, tenant)


KINDS = ("", "lora", "lora-two", "prefix", "prompt", "bottleneck")


def crowd(base: Base, count: int, **sampling: Any) -> list[Request]:
    """Requests of all kinds, prompts and lengths."""
    made = []
    for i in range(count):
        wanted = Sampling(**({"max_tokens": 3 + 5 * i % 24, "ignore_end": True, "seed": i} | sampling))
        made.append(ask(base, f"crowd{i}", wanted, KINDS[i % len(KINDS)], PROMPT[i % 9 :] * (1 + i % 3), f"t{i % 3}"))
    return made


# -------------------------------------------------------------------------------------------------- what is answered


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


# ---------------------------------------------------------------------------------------------------- what is refused


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


# ------------------------------------------------------------------------------------------------------ cancellation


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
    adapters.special["slow"] = lambda: gate.wait(30) and adapters.make("slow")
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


# ------------------------------------------------------------------------------------------------------- what breaks


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


def test_a_slow_adapter_keeps_nobody(base, engine, adapters):
    gate = threading.Event()
    adapters.special["slow"] = lambda: gate.wait(30) and adapters.make("slow")
    log = run(engine, ask(base, "x", GREEDY, "slow"), ask(base, "y"), until=lambda log: "y" in log.last)
    assert "x" not in log.last
    engine.step()
    assert not engine.wait(0.05), "nothing to do until it is there"
    threading.Timer(0.05, gate.set).start()
    assert engine.wait(10)
    run(engine, log=log)
    assert len(log.tokens["x"]) == 16


# ------------------------------------------------------------------------------------------------- adapters that change


def test_one_that_is_replaced_finishes_what_it_has_begun(base, new_engine, adapters):
    """The same name, another digest."""
    engine = new_engine(adapter_memory=0)
    old, new = (run(engine, ask(base, "x", GREEDY, f"lora@{v}")).tokens["x"] for v in ("one", "second"))
    assert old != new
    assert len(adapters.asked) == 2
    log = run(engine, ask(base, "old", GREEDY, "lora@one"), until=lambda log: len(log.tokens["old"]) > 4)
    run(engine, ask(base, "new", GREEDY, "lora@second"), until=lambda log: len(log.tokens["new"]) > 2, log=log)
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


# ------------------------------------------------------------------------------------------------------------- threads


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
    adapters.special["slow"] = lambda: gate.wait(30) and adapters.make("slow")
    engine.step()
    before = time.monotonic()
    assert not engine.wait(0.1)
    assert time.monotonic() - before > 0.09
    threading.Timer(0.05, lambda: engine.add(ask(base, "x", GREEDY, "slow"))).start()
    assert engine.wait(10)
    engine.step()
    assert not engine.wait(0.05), "its adapter is not there"
    threading.Timer(0.05, lambda: engine.cancel("x")).start()
    assert engine.wait(10)
    assert [event.id for event in engine.step()] == ["x"]
    gate.set()
    assert engine.wait(10), "the adapter has come"


def test_it_is_awake_for_as_long_as_something_runs(base, engine):
    log = Log()
    engine.add(ask(base, "x", GREEDY, "prompt"))
    while engine.in_flight():
        assert engine.wait(10)
        log.take(engine.step())
    engine.step()
    assert not engine.wait(0)


# --------------------------------------------------------------------------------------------------------------- stats


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
    assert 16 <= steps <= 20
    run(engine, ask(base, "d", GREEDY, "lora", PROMPT * 2))
    stats = engine.stats()
    assert stats.cached_tokens == len(first.prompt) - 1
    assert stats.prompt_tokens == len(first.prompt) + len(second.prompt)  # its last token counts as the first written
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


# ------------------------------------------------------------------------------------------------------------ fairness


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
