"""What OpenAI's own client sees, and what it may ask for."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import threading
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from serve.config import Listen
from serve.listener import bound
from tests.serve.conftest import Running

HELLO: list[Any] = [{"role": "user", "content": "What cheese do you have?"}]
GREEDY: dict[str, Any] = {"messages": HELLO, "temperature": 0, "max_tokens": 12}


def test_no_connection_waits_for_an_ack() -> None:
    """Whatever the loop: an answer's body would wait 40 ms for its head's, on every connection that is kept."""
    with bound(Listen(port=1).model_copy(update={"port": 0})) as listener:
        with socket.create_connection(listener.getsockname()):
            listener.setblocking(True)
            accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_chat_answer(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    base = client.chat.completions.create(model="base", **GREEDY)
    adapter = client.chat.completions.create(model="acme/cheese", **GREEDY)
    for answer in (base, adapter):
        [choice] = answer.choices
        assert answer.object == "chat.completion"
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("stop", "length")
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 5
        assert 0 < answer.usage.completion_tokens <= 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert base.choices[0].message.content != adapter.choices[0].message.content
    assert client.chat.completions.create(model="embedded", **GREEDY).choices == base.choices


def test_a_streamed_answer_is_the_same(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    for model in ("base", "acme/cheese", "acme/brie"):
        whole = client.chat.completions.create(model=model, **GREEDY)
        parts = list(
            client.chat.completions.create(model=model, stream=True, stream_options={"include_usage": True}, **GREEDY)
        )
        *spoken, last = parts
        assert last.choices == []
        assert last.usage is not None
        assert whole.usage is not None
        assert last.usage.completion_tokens == whole.usage.completion_tokens
        assert all(part.usage is None for part in spoken)
        assert spoken[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in spoken) == whole.choices[0].message.content
        assert [p.choices[0].finish_reason for p in spoken if p.choices[0].finish_reason] == [
            whole.choices[0].finish_reason
        ]
        assert len({part.id for part in parts}) == 1


def test_completions_of_text_and_of_tokens(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    prompts = open_endpoint.endpoint.prompts
    text = client.completions.create(model="base", prompt="Once upon a time", temperature=0, max_tokens=8)
    tokens = list(prompts.of_text("Once upon a time"))
    assert client.completions.create(model="base", prompt=tokens, temperature=0, max_tokens=8).choices == text.choices
    both = client.completions.create(
        model="base", prompt=["Once upon a time", "The dog"], temperature=0, max_tokens=8, n=2
    )
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == text.choices[0].text
    assert both.choices[2].text == both.choices[3].text != text.choices[0].text
    assert both.usage is not None
    assert both.usage.prompt_tokens == len(tokens) + len(prompts.of_text("The dog")), "shared prompts count once"
    default = client.completions.create(model="base", prompt="Once upon a time", extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_streams_of_several_answers(open_endpoint: Running) -> None:
    stream = open_endpoint.client().chat.completions.create(
        model="base", messages=HELLO, n=3, seed=5, max_tokens=10, stream=True
    )
    texts, ends = {0: "", 1: "", 2: ""}, {}
    for part in stream:
        [choice] = part.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert set(ends) == {0, 1, 2}
    whole = open_endpoint.client().chat.completions.create(model="base", messages=HELLO, n=3, seed=5, max_tokens=10)
    assert [c.message.content for c in whole.choices] == [texts[i] for i in range(3)]
    assert len(set(texts.values())) > 1, "each answer has a seed of its own"


def test_a_seed_gives_the_same_again_and_none_does_not(open_endpoint: Running) -> None:
    def ask(**more: Any) -> str | None:
        answer = open_endpoint.client().chat.completions.create(
            model="base", messages=HELLO, temperature=1.5, max_tokens=16, **more
        )
        return answer.choices[0].message.content

    assert ask(seed=1) == ask(seed=1)
    assert ask(seed=1) != ask(seed=2)
    assert len({ask() for _ in range(4)}) > 1


def test_logprobs_of_chats(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    answer = client.chat.completions.create(model="base", logprobs=True, top_logprobs=3, **GREEDY)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert answer.usage is not None
    assert len(found.content) == answer.usage.completion_tokens
    for one in found.content:
        assert len(one.top_logprobs) == 3
        assert one.logprob <= 0
        assert one.logprob == pytest.approx(max(t.logprob for t in one.top_logprobs)), "greedy takes the best"
        assert one.bytes is None or bytes(one.bytes).decode() == one.token
    text = "".join(one.token for one in found.content)
    assert text.startswith(answer.choices[0].message.content or "")
    streamed: list[Any] = []
    for part in client.chat.completions.create(model="base", logprobs=True, top_logprobs=3, stream=True, **GREEDY):
        if part.choices[0].logprobs:
            streamed += part.choices[0].logprobs.content or []
    assert [one.token for one in streamed] == [one.token for one in found.content]
    # keys and values that are there already were computed in another batch
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in found.content], abs=1e-3)


def test_logprobs_of_completions(open_endpoint: Running) -> None:
    answer = open_endpoint.client().completions.create(
        model="base", prompt="The dog", temperature=0, max_tokens=6, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 6
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]
    assert "".join(found.tokens) == answer.choices[0].text


def test_stop_bias_and_penalties(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    plain = (
        client.completions.create(model="base", prompt="Once upon a time", temperature=0, max_tokens=30).choices[0].text
    )
    word = plain.split()[3]
    cut = client.completions.create(model="base", prompt="Once upon a time", temperature=0, max_tokens=30, stop=[word])
    assert cut.choices[0].text == plain[: plain.index(word)]
    assert cut.choices[0].finish_reason == "stop"
    [token] = open_endpoint.endpoint.prompts._tokenizer("!", add_special_tokens=False).input_ids[-1:]
    biased = client.completions.create(
        model="base", prompt="Once", temperature=0, max_tokens=5, logit_bias={str(token): 100}
    )
    assert set(biased.choices[0].text.replace(" ", "")) == {"!"}
    penalized = client.completions.create(
        model="base", prompt="Once upon a time", temperature=0, max_tokens=30, presence_penalty=2, frequency_penalty=2
    )
    assert penalized.choices[0].text != plain
    extras = client.completions.create(
        model="base", prompt="Once upon a time", max_tokens=30, extra_body={"top_k": 1, "min_p": 0.1}
    )
    assert extras.choices[0].text == plain, "the most probable alone"


def test_json_and_json_schema(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cheddar", "brie"]}, "age": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["kind", "age"],
        "additionalProperties": False,
    }
    whole = []
    for seed in range(6):  # some run out of tokens: white space is JSON too
        answer = client.chat.completions.create(
            model="acme/cheese",
            messages=HELLO,
            max_tokens=120,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
        )
        if answer.choices[0].finish_reason == "stop":
            whole.append(json.loads(answer.choices[0].message.content or ""))
    assert whole
    for found in whole:
        assert found["kind"] in ("cheddar", "brie")
        assert 0 <= found["age"] <= 99
    answer = client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=200, temperature=0, response_format={"type": "json_object"}
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    with pytest.raises(openai.BadRequestError, match="schema"):
        client.chat.completions.create(
            model="base",
            messages=HELLO,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}},
        )


def test_models(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    names = [model.id for model in client.models.list()]
    assert names[0] == "embedded"
    assert set(names) == {"embedded", "acme/cheese", "acme/brie", "other/cheese", "shared/common"}
    assert client.models.retrieve("acme/cheese").id == "acme/cheese"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("acme/none")


def test_a_version_may_be_named(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    assert open_endpoint.endpoint.catalog.registry is not None
    digest = open_endpoint.endpoint.catalog.registry.resolve("acme", "cheese").digest
    named = client.chat.completions.create(model=f"acme/cheese@{digest[:10]}", **GREEDY)
    assert named.choices == client.chat.completions.create(model="acme/cheese", **GREEDY).choices
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=f"acme/brie@{digest[:10]}", **GREEDY)


def test_what_the_client_makes_of_errors(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="none", **GREEDY)
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"
    assert error.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="base", messages=HELLO, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="base", prompt="word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="base", messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.code == "unsupported_parameter"
    client.chat.completions.create(
        model="base", messages=HELLO, max_tokens=1, tools=[], user="me", metadata={"a": "b"}, store=False
    )


def test_a_busy_endpoint_is_tried_again(open_endpoint: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 slots and 8 waiting: of 20 at once, those refused come back after Retry-After, as the package does itself."""
    refused: list[openai.RateLimitError] = []
    full, step = threading.Event(), open_endpoint.engine.step

    def held() -> Any:
        full.wait(60)  # nothing ends before one was too many
        return step()

    monkeypatch.setattr(open_endpoint.engine, "step", held)

    async def ask(client: AsyncOpenAI, i: int) -> int:
        try:
            answer = await client.completions.create(
                model="base", prompt=f"Number {i}", max_tokens=30, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            refused.append(error)
            full.set()
            return 0
        assert answer.usage is not None
        return answer.usage.completion_tokens

    async def all_at_once(retries: int) -> list[int]:
        url = f"{open_endpoint.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=retries, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(20)))

    first = asyncio.run(all_at_once(0))
    assert sorted(set(first)) == [0, 30]
    assert first.count(0) == len(refused)
    assert first.count(30) >= 12
    assert {error.code for error in refused} == {"overloaded"}
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in refused)
    assert asyncio.run(all_at_once(6)) == [30] * 20


def test_async_streams_of_many_models_at_once(open_endpoint: Running) -> None:
    client = open_endpoint.client()
    models = ["base", "acme/cheese", "acme/brie", "other/cheese"]
    alone = {m: client.chat.completions.create(model=m, **GREEDY).choices[0].message.content for m in models}

    async def ask(client: AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(model=model, stream=True, **GREEDY)
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{open_endpoint.url}/v1", api_key="none", max_retries=3) as client:
            return await asyncio.gather(*(ask(client, model) for model in models * 2))

    assert asyncio.run(together()) == [alone[model] for model in models * 2]
    assert alone["acme/brie"] == alone["other/cheese"], "the same adapter under two names"
    assert len(set(alone.values())) == 3


def test_usage_while_it_goes(open_endpoint: Running) -> None:
    """What the page shows of the speed."""
    stream = open_endpoint.client().chat.completions.create(
        model="base",
        stream=True,
        stream_options={"continuous_usage_stats": True},
        **GREEDY,  # type: ignore[typeddict-unknown-key]
    )
    counts = [part.usage.completion_tokens for part in stream if part.usage]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] or math.isclose(counts[-1], 1)


def test_curl(open_endpoint: Running) -> None:
    body = json.dumps({"model": "acme/cheese", "stream": True, **GREEDY})
    url = f"{open_endpoint.url}/v1/chat/completions"
    command = ["curl", "-sSN", "-H", "Content-Type: application/json", "-d", body, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    events = [line for line in done.stdout.split("\n\n") if line]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event[6:])["object"] == "chat.completion.chunk" for event in events[:-1])
