"""What one request costs its tenant, whatever becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ftray.engine.request import Chunk, Finished, Request, Usage
from ftray.errors import RunError
from serve.catalog import Caller, Catalog
from serve.config import ServeConfig
from serve.endpoint import Endpoint, Served, SlowClient
from serve.errors import ApiError
from serve.limits import Quotas
from serve.link import Link
from serve.metrics import Metrics
from serve.openai import CompletionRequest
from serve.tenants import Limits
from serve.wire import Accepted, Refused
from tests.clocks import Hurried

ACME = Caller("acme")
LIMITS = Limits(tokens_per_minute=1000, concurrency=8)
PROMPT = (1, 2, 3)


class Scripted:
    """A replica that writes 5 tokens to each request, and then does what its number says."""

    def __init__(self, *then: str) -> None:
        self.then = then
        self.events_of: asyncio.Queue[Any] = asyncio.Queue()

    async def run(self, request: Request, ingress: str, streams: bool) -> AsyncGenerator[Any, None]:
        then = self.then[int(request.id.rsplit("-", 1)[1])]
        if then == "full":
            yield Refused(None)
            return
        yield Accepted("replica")
        written = Chunk(request.id, "abcde", (1, 2, 3, 4, 5))
        failed = Finished(request.id, "error", Usage(3, 0, 5), RunError("no"))
        events: list[Any] = [written, failed] if then == "fails" else [written]
        if streams:
            self.events_of.put_nowait(events)
        else:
            yield events
        await asyncio.sleep(0.05)
        while then == "goes on and on":
            self.events_of.put_nowait([written])
            await asyncio.sleep(0)
        if then == "dies":
            raise ConnectionError
        await asyncio.sleep(60)

    async def events(self, ingress: str, replica: str) -> AsyncGenerator[Any, None]:
        while True:
            yield await self.events_of.get()

    async def stats(self) -> list[dict[str, Any]]:
        return []


def endpoint(*then: str, **bounds: Any) -> Endpoint:
    config = ServeConfig.model_validate({"model": {"path": "embedded"}, "bounds": bounds})
    prompts: Any = SimpleNamespace(of_text=lambda text: PROMPT)
    found = Endpoint(
        config,
        prompts=prompts,
        catalog=Catalog(None, "embedded", None, 1),
        link=Link(Scripted(*then), "ingress", 1 << 20),
        metrics=Metrics("ingress"),
        tenants=None,
        cores=2,
    )
    found.context = 100
    found.quotas = Quotas(clock=lambda: 0.0)  # what is spent does not come back
    return found


def ask(found: Endpoint, answer: Callable[[Served], Awaitable[Any]], **more: Any) -> BaseException | None:
    """What became of one request; the endpoint has settled by then."""

    async def whole() -> BaseException | None:
        body = CompletionRequest.model_validate({"model": "base", "prompt": "x", **more})
        try:
            await answer(await found.begin("id", ACME, LIMITS, body, 0.0))
        except BaseException as error:  # noqa: BLE001 - also CancelledError
            return error
        finally:
            await asyncio.sleep(0.05)
        return None

    with asyncio.Runner(loop_factory=Hurried) as runner:  # what is ready comes before what is due
        return runner.run(whole())


def spent(found: Endpoint) -> int:
    account = found.quotas._account("acme", LIMITS)
    assert account.running == 0
    assert account.tokens is not None
    return round(1000 - account.tokens.level)


def counted(found: Endpoint) -> dict[str, int]:
    """{name or reason: value}"""
    values: dict[str, int] = {}
    for family in text_string_to_metric_families(found.metrics.page([]).decode()):
        for sample in family.samples:
            if sample.name in ("ftray_answers_total", "ftray_completion_tokens_total", "ftray_prompt_tokens_total"):
                values[sample.labels.get("reason", sample.name)] = int(sample.value)
    return {name: value for name, value in values.items() if value}


async def takes(data: bytes) -> None:
    pass


async def takes_nothing(data: bytes) -> None:
    await asyncio.sleep(60)


async def hangs_up(served: Served, work: Any) -> None:
    task = asyncio.ensure_future(work)
    while not served.answers[0].written:
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)
    task.cancel()
    await task


@pytest.mark.parametrize("streams", [True, False])
def test_who_hangs_up_pays_for_what_was_written(streams: bool) -> None:
    found = endpoint("goes on")
    error = ask(
        found,
        lambda served: hangs_up(served, found.stream(served, takes) if streams else found.whole(served)),
        stream=streams,
    )
    assert isinstance(error, asyncio.CancelledError)
    assert spent(found) == 3 + 5
    assert counted(found) == {
        "cancelled": 1,
        "ftray_completion_tokens_total": 5,
        "ftray_prompt_tokens_total": 3,
    }


def test_who_takes_nothing_pays_too() -> None:
    found = endpoint("goes on", write_seconds=0.05)
    assert isinstance(ask(found, lambda served: found.stream(served, takes_nothing), stream=True), SlowClient)
    assert spent(found) == 3 + 5
    assert counted(found)["cancelled"] == 1


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(("then", "reason", "status"), [("goes on", "cancelled", 408), ("dies", "error", 503)])
def test_an_answer_that_is_cut_off_counts(streams: bool, then: str, reason: str, status: int) -> None:
    found = endpoint(then, request_seconds=0.5 if status == 408 else 60)
    said: list[bytes] = []

    async def send(data: bytes) -> None:
        said.append(data)

    error = ask(found, lambda served: found.stream(served, send) if streams else found.whole(served), stream=streams)
    if streams:
        assert (b"timeout" if status == 408 else b"replica_lost") in said[-1]
    else:
        assert isinstance(error, ApiError)
        assert error.status == status
    assert spent(found) == 3 + 5
    assert counted(found) == {reason: 1, "ftray_completion_tokens_total": 5, "ftray_prompt_tokens_total": 3}


@pytest.mark.parametrize("streams", [True, False])
def test_the_siblings_of_an_answer_that_fails_count_and_each_once(streams: bool) -> None:
    found = endpoint("goes on", "fails")
    ask(found, lambda served: found.stream(served, takes) if streams else found.whole(served), stream=streams, n=2)
    assert spent(found) == 3 + 5 + 5
    assert counted(found) == {
        "cancelled": 1,
        "error": 1,
        "ftray_completion_tokens_total": 10,
        "ftray_prompt_tokens_total": 6,
    }


def test_a_stream_has_an_end_whoever_reads_it() -> None:
    """Ray's proxies read for a client who does not, and keep all of it."""
    found, said = endpoint("goes on and on", stream_bytes=4096), []

    async def send(data: bytes) -> None:
        said.append(data)

    assert ask(found, lambda served: found.stream(served, send), stream=True, n=1) is None
    *parts, last = said
    assert 3000 < len(b"".join(parts)) <= 4096
    assert b"answer_too_large" in last
    assert spent(found) >= 3 + 5 * len(parts)


@pytest.mark.parametrize("then", [("full",), ("goes on", "full")])
def test_a_prompt_that_no_engine_took_costs_nothing(then: tuple[str, ...]) -> None:
    found = endpoint(*then)
    error = ask(found, lambda served: found.whole(served), n=len(then))
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (429, "overloaded")
    assert spent(found) == 0
