"""Request bodies that cost more than they look: what is wrong is told at once, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from serve.api import read_body
from serve.endpoint import LONG_TEXT, Endpoint
from serve.errors import ApiError
from serve.openai import ChatRequest, CompletionRequest, sampling_of

CHOICES = 16
MEBIBYTE = 1 << 20
BASE = {"model": "base"}
CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hello"}]}


def written(body: dict[str, Any] | bytes) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()


def refusal(kind: Any, body: dict[str, Any] | bytes) -> ApiError:
    content = written(body)
    with pytest.raises(ApiError) as error:
        read_body(content, kind, CHOICES)
    assert error.value.status == 400
    assert len(error.value.message) < 600
    return error.value


def many(item: Any) -> list[Any]:
    """A mebibyte of it."""
    return [item] * (MEBIBYTE // (len(json.dumps(item, separators=(",", ":"))) + 1) - 20)


WIDE = {f"k{i}": 0 for i in range(100_000)}
DEEP = b'{"prompt":"a","model":' + b"[" * 1000 + b"]" * 1000 + b"}"
HOSTILE: dict[str, tuple[Any, dict[str, Any] | bytes, str]] = {
    "prompts that are none": (CompletionRequest, {**BASE, "prompt": many({})}, "n"),
    "short prompts": (CompletionRequest, {**BASE, "prompt": many("a")}, "n"),
    "short lists": (CompletionRequest, {**BASE, "prompt": many([1])}, "n"),
    "a few prompts, twice": (CompletionRequest, {**BASE, "prompt": ["a"] * 9, "n": 2}, "n"),
    "tokens that are none": (CompletionRequest, {**BASE, "prompt": [1, *many("a")]}, "prompt"),
    "a list of what is none": (CompletionRequest, {**BASE, "prompt": [many("a")]}, "prompt"),
    "keys": (CompletionRequest, {**BASE, "prompt": "a", **WIDE}, "k0"),
    "a long key": (CompletionRequest, {**BASE, "prompt": "a", "k" * MEBIBYTE: 0}, "k" * 77 + "…"),
    "biases": (CompletionRequest, {**BASE, "prompt": "a", "logit_bias": WIDE}, "logit_bias"),
    "stops": (CompletionRequest, {**BASE, "prompt": "a", "stop": many(1)}, "stop"),
    "a deep model": (CompletionRequest, DEEP, "model"),
    "a wide model": (CompletionRequest, {"prompt": "a", "model": many({})}, "model"),
    "messages": (ChatRequest, {**BASE, "messages": many({})}, "messages"),
    "4,096 messages": (ChatRequest, {**BASE, "messages": [{}] * 4096}, "messages"),
    "parts": (ChatRequest, {**BASE, "messages": [{"role": "user", "content": many({})}]}, "messages"),
    "a wide message": (ChatRequest, {**BASE, "messages": [{"role": "user", "content": "x", **WIDE}]}, "messages"),
    "a long tag": (ChatRequest, {**CHAT, "response_format": {"type": "x" * MEBIBYTE}}, "response_format"),
    "wide options": (ChatRequest, {**CHAT, "stream_options": WIDE}, "stream_options"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_mebibyte_that_is_wrong_is_refused_without_being_gone_through(name: str) -> None:
    kind, body, param = HOSTILE[name]
    content = written(body)
    began = time.process_time()
    assert refusal(kind, content).param == param
    assert time.process_time() - began < 3, "of the one thread that answers all; gone through it takes half a minute"


def test_prompts_of_every_kind() -> None:
    def prompts(prompt: Any) -> list[Any]:
        return read_body(json.dumps({**BASE, "prompt": prompt}).encode(), CompletionRequest, CHOICES).prompts()

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]
    for wrong, said in (
        ([], "prompt: "),
        ([[]], "prompt.0: "),
        (["a", 1], "prompt.1: input should be a valid string"),
        ([1, "a"], "prompt.1: input should be a valid integer"),
        ([True], "prompt.0: input should be a valid integer"),
        ({}, "prompt: input should be a valid string"),
    ):
        assert refusal(CompletionRequest, {**BASE, "prompt": wrong}).message.startswith(said)


def test_texts_that_are_long_together_are_tokenized_in_a_thread() -> None:
    seen: list[threading.Thread] = []

    def tokens(text: Any) -> tuple[int, ...]:
        seen.append(threading.current_thread())
        return (1,)

    prompts = SimpleNamespace(of_text=tokens, of_chat=tokens)
    endpoint: Any = SimpleNamespace(prompts=prompts)
    endpoint._tokens = lambda body: Endpoint._tokens(endpoint, body)

    def in_thread(kind: Any, **body: Any) -> bool:
        seen.clear()
        asyncio.run(Endpoint._tokenized(endpoint, kind.model_validate({**BASE, **body})))
        return seen[0] is not threading.current_thread()

    part = "x" * (LONG_TEXT // 8 + 1)
    assert not in_thread(CompletionRequest, prompt=part)
    assert in_thread(CompletionRequest, prompt=[part] * 8), "none of them is long alone"
    assert in_thread(CompletionRequest, prompt=part * 8)
    assert in_thread(ChatRequest, messages=[{"role": "user", "content": part}] * 8)
    assert in_thread(ChatRequest, messages=[{"role": "assistant", "content": ""}] * 4096), "a template goes through it"
    assert not in_thread(ChatRequest, messages=[{"role": "user", "content": part}])


def test_a_schema_nested_too_deep_is_refused() -> None:
    def grammar(depth: int) -> Any:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"items": schema}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = ChatRequest.model_validate({**CHAT, "response_format": wanted})
        return sampling_of(body, prompt_tokens=1, context=10, index=0).grammar

    assert json.loads(grammar(100).schema)["items"]
    for depth in (960, 5000):
        with pytest.raises(ApiError) as error:
            grammar(depth)
        assert (error.value.status, error.value.param) == (400, "response_format")
