"""One request from the moment its body is read to its last byte. Knows the engine's events and OpenAI's shapes; HTTP is
in `api.py`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from ftray.engine.request import Chunk, Finished, Request, Usage
from ftray.errors import RequestError
from ftray.registry.ref import Ref

from .catalog import OPEN, Caller, Catalog
from .config import ServeConfig
from .errors import ApiError, bad_request, of_engine
from .limits import Quotas, Ticket
from .link import Answer, Link, texts
from .metrics import Metrics, Series
from .openai import ChatRequest, CompletionRequest, Probabilities, Shape, sampling_of, usage_of
from .prompts import Prompts
from .tenants import Limits, Tenants

log = logging.getLogger("ray.serve")
WATCH_SECONDS = 5.0
TENANTS_SECONDS = 5.0
"""How long a request waits for its tenants' file to be read again; then those that are known count."""
LONG_TEXT = 16_384
"""Characters of a request from which on it is tokenized in a thread, so that other streams go on."""
Send = Callable[[bytes], Awaitable[None]]


class SlowClient(Exception):
    """The client takes nothing any more."""


@dataclass
class Served:
    """One request in the making."""

    id: str
    caller: Caller
    body: ChatRequest | CompletionRequest
    adapter: Ref | None
    prompts: list[tuple[int, ...]]
    shape: Shape
    ticket: Ticket
    arrived: float
    answers: list[Answer] = field(default_factory=list)
    usages: dict[int, Usage] = field(default_factory=dict)
    """Of each choice that has ended."""
    written: int = 0
    """Tokens that were streamed by now."""

    def usage(self) -> dict[str, Any]:
        return usage_of([self.usages[i] for i in sorted(self.usages)], self.body.count)


class Endpoint:
    """What an ingress holds. For one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        prompts: Prompts,
        catalog: Catalog,
        link: Link,
        metrics: Metrics,
        tenants: Tenants | None,
        cores: int,
        sees_clients: bool = True,
    ) -> None:
        self.config, self.prompts, self.catalog, self.link = config, prompts, catalog, link
        self.metrics, self.tenants = metrics, tenants
        self.sees_clients = sees_clients
        """Whether a connection's address is its client's."""
        self.quotas = Quotas(config.ingress.replicas)
        self.context: int | None = None
        """Tokens of a prompt and its answer; None: no replica has said so yet."""
        self.replicas = 0
        """Engine replicas that answered last."""
        self.fingerprint = "fp_" + secrets.token_hex(5)
        self.streams = 0
        self._messages_per_second = config.bounds.messages_per_second or 200 * cores

    async def watch(self) -> None:
        """Keep knowing whether there is an engine, as long as the ingress lives."""
        while True:
            told: Exception | str = "none of them runs"
            try:
                found = await self.link.stats()
            except Exception as error:  # noqa: BLE001 - Ray's errors have no common root
                found, told = [], error
            if self.replicas and not found:
                log.warning("the engine's replicas do not answer: %s", told)
            self.replicas = len(found)
            if found:
                self.context = min(stats["context"] for stats in found)
            await asyncio.sleep(WATCH_SECONDS if found else 0.5)

    # ---------------------------------------------------------------------------------------------------- who asks

    async def caller(self, authorization: str | None) -> tuple[Caller, Limits]:
        """Who shows this header. Raises ApiError 401."""
        if self.tenants is None:
            return OPEN, Limits()
        if self.tenants.is_due:
            await self._look_at(self.tenants)
        kind, _, key = (authorization or "").partition(" ")
        name = self.tenants.tenant_of(key.strip()) if kind.lower() == "bearer" and key else None
        tenant = self.tenants.get(name) if name else None
        if name is None or tenant is None:
            missing = "Write your key into the header: Authorization: Bearer KEY."
            raise ApiError(401, "This key is not known, or no longer." if key else missing, code="invalid_api_key")
        return Caller(name), tenant.limits

    @staticmethod
    async def _look_at(tenants: Tenants) -> None:
        try:
            said = await asyncio.wait_for(asyncio.to_thread(tenants.refresh), TENANTS_SECONDS)
        except TimeoutError:
            said = tenants.status.error = f"the last good ones stay: {tenants.uri} is not read in {TENANTS_SECONDS:g} s"
        if said:
            log.warning("tenants: %s", said)

    # ------------------------------------------------------------------------------------------------- one request

    async def begin(
        self, id: str, caller: Caller, limits: Limits, body: ChatRequest | CompletionRequest, arrived: float
    ) -> Served:
        """Check, tokenize, count against the tenant's limits, and hand to the engine. Raises ApiError."""
        if self.context is None:
            raise ApiError(503, "No engine is ready yet.", code="not_ready", retry_after=2)
        adapter = await self.catalog.choose(caller, body.model)
        prompts = await self._tokenized(body)
        requests = [
            Request(
                id=f"{id}-{p * body.count + i}",
                prompt=prompt,
                sampling=sampling_of(body, prompt_tokens=len(prompt), context=self.context, index=i),
                adapter=adapter,
                tenant=caller.tenant,
            )
            for p, prompt in enumerate(prompts)
            for i in range(body.count)
        ]
        read = sum(map(len, prompts))
        ticket = self.quotas.admit(caller.tenant, limits, tokens=read, answers=len(requests))
        is_chat = isinstance(body, ChatRequest)
        shape = Shape(
            chat=is_chat,
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{id}",
            created=int(time.time()),
            model=body.model,
            fingerprint=self.fingerprint,
        )
        served = Served(id, caller, body, adapter, prompts, shape, ticket, arrived)
        try:
            starts = [self.link.start(request, streams=bool(body.stream)) for request in requests]
            found = await asyncio.gather(*starts, return_exceptions=True)
            served.answers = [answer for answer in found if isinstance(answer, Answer)]
            for error in found:
                if isinstance(error, BaseException):
                    raise error
        except BaseException as error:
            self.end(served)
            if isinstance(error, ApiError):  # nobody answers, and nobody left
                ticket.charge(-read)
            raise
        self.metrics.in_flight.inc()
        return served

    async def _tokenized(self, body: ChatRequest | CompletionRequest) -> list[tuple[int, ...]]:
        long = body.size > LONG_TEXT
        found = await asyncio.to_thread(self._tokens, body) if long else self._tokens(body)
        if not all(found):
            raise bad_request("A prompt without tokens leaves nothing to go on from.", "prompt")
        return found

    def _tokens(self, body: ChatRequest | CompletionRequest) -> list[tuple[int, ...]]:
        if isinstance(body, ChatRequest):
            return [self.prompts.of_chat(body.turns())]
        of = self.prompts
        return [of.of_text(prompt) if isinstance(prompt, str) else of.checked(prompt) for prompt in body.prompts()]

    def end(self, served: Served) -> None:
        """Give back all that the request holds, once; what is still being made is cancelled."""
        for answer in served.answers:
            if answer.end is None:
                answer.cancel()
        served.ticket.close()

    def note(self, served: Served, index: int, end: Finished) -> None:
        """One answer ended. It counts once."""
        if index in served.usages:
            return
        if end.error is not None and not isinstance(end.error, RequestError):
            log.error("request %s, adapter %s: %s", served.id, served.adapter or "-", end.error)
        usage, series = end.usage, self._series(served)
        served.usages[index] = usage
        served.ticket.charge(usage.completion_tokens)
        series.answers[end.reason].inc()
        series.prompt_tokens.inc(usage.prompt_tokens)
        series.cached_tokens.inc(usage.cached_tokens)
        series.completion_tokens.inc(usage.completion_tokens)

    def _series(self, served: Served) -> Series:
        return self.metrics.series(served.caller.tenant, served.adapter.digest if served.adapter else None)

    def finish(self, served: Served) -> None:
        """`end`, of a request that was begun. What was written counts, whether or not its end came: a client that hangs
        up has had it written."""
        self.end(served)
        for index, answer in enumerate(served.answers):
            self.note(served, index, answer.end or answer.cut_off())
        self.metrics.in_flight.dec()
        seconds = time.monotonic() - served.arrived
        self._series(served).latency.observe(seconds)
        log.info(
            "request %s tenant %s model %s adapter %s: %d answers, %d tokens, %.3f s",
            served.id,
            served.caller.tenant,
            served.body.model,
            served.adapter or "-",
            len(served.answers),
            sum(u.completion_tokens for u in served.usages.values()),
            seconds,
        )

    # ----------------------------------------------------------------------------------------------------- answering

    async def whole(self, served: Served) -> dict[str, Any]:
        """The answer of a request that does not stream. Raises ApiError."""
        try:
            async with asyncio.timeout(self.config.bounds.request_seconds):
                choices = await asyncio.gather(*(self._choice(served, i) for i in range(len(served.answers))))
            return served.shape.answer(choices, served.usage())
        except TimeoutError:
            raise self._too_long() from None
        finally:
            self.finish(served)

    def _too_long(self) -> ApiError:
        seconds = self.config.bounds.request_seconds
        return ApiError(408, f"The answer took longer than {seconds:g} s and was cancelled.", code="timeout")

    async def _choice(self, served: Served, index: int) -> dict[str, Any]:
        answer, chunks, end = served.answers[index], list[Chunk](), None
        while end is None:
            events = await answer.next()
            more, end = texts(events)
            chunks += more
        self.note(served, index, end)
        if end.reason not in ("stop", "length"):
            raise of_engine(end.error)
        found = Probabilities(self.prompts, chat=served.shape.chat, wanted=served.body.alternatives).of(chunks)
        return served.shape.choice(index, "".join(chunk.text for chunk in chunks), found, end.reason)

    async def stream(self, served: Served, send: Send) -> None:
        """Send the answer as server-sent events. An error after the first of them is an event too, and then there is
        no `[DONE]`; one before it is raised, as ApiError. Raises SlowClient when the client takes nothing."""
        self.streams += 1
        lock, sent, most = asyncio.Lock(), 0, self.config.bounds.stream_bytes

        async def say(*messages: dict[str, Any]) -> None:
            nonlocal sent
            data = _events(*messages)
            async with lock:
                if sent + len(data) > most:
                    text = f"A streamed answer has at most {most:,} bytes; ask for less, or for fewer `logprobs`."
                    raise ApiError(400, text, code="answer_too_large")
                sent += len(data)
                await self._send(send, data)

        try:
            error = await self._stream_choices(served, say)
            if error is not None and not sent:
                raise error
            if error is not None:
                await self._send(send, _events(error.body))
                return
            usage = _events(served.shape.usage_part(served.usage())) if served.body.includes_usage else b""
            await self._send(send, usage + b"data: [DONE]\n\n")
        finally:
            self.streams -= 1
            self.finish(served)

    async def _send(self, send: Send, data: bytes) -> None:
        try:
            async with asyncio.timeout(self.config.bounds.write_seconds):
                await send(data)
        except TimeoutError:
            raise SlowClient from None

    async def _stream_choices(self, served: Served, say: Callable[..., Awaitable[None]]) -> ApiError | None:
        """All answers at once; the first error ends them all."""
        try:
            async with asyncio.timeout(self.config.bounds.request_seconds), asyncio.TaskGroup() as group:
                for index in range(len(served.answers)):
                    group.create_task(self._stream_choice(served, index, say))
        except TimeoutError:
            return self._too_long()
        except BaseExceptionGroup as found:
            error = found.exceptions[0]
            if isinstance(error, ApiError):
                return error
            raise error from None
        return None

    def _counted(self, served: Served, message: dict[str, Any]) -> dict[str, Any]:
        if not served.body.counts_as_it_goes:
            return message
        read = sum(map(len, served.prompts))
        usage = {"prompt_tokens": read, "completion_tokens": served.written, "total_tokens": read + served.written}
        return {**message, "usage": usage}

    async def _stream_choice(self, served: Served, index: int, say: Callable[..., Awaitable[None]]) -> None:
        answer, shape, series = served.answers[index], served.shape, self._series(served)
        probabilities = Probabilities(self.prompts, chat=shape.chat, wanted=served.body.alternatives)
        last: float | None = None
        end: Finished | None = None
        if shape.chat:
            opening = shape.part(index, "", None, None, first=True)
        while end is None:
            chunks, end = texts(await answer.next())
            now = time.monotonic()
            tokens = sum(len(chunk.tokens) for chunk in chunks)
            if last is None and tokens:
                series.first_token.observe(now - served.arrived)
            elif last is not None and tokens:
                series.between_tokens.observe((now - last) / tokens)
            messages = [opening] if last is None and shape.chat and (tokens or end) else []
            last = now if tokens else last
            text = "".join(chunk.text for chunk in chunks)
            found = probabilities.of(chunks)
            if text or (found is not None and tokens):
                messages.append(shape.part(index, text, found, None))
            if end is not None:
                self.note(served, index, end)
                if end.reason not in ("stop", "length"):
                    raise of_engine(end.error)
                messages.append(shape.part(index, "", None, end.reason))
            served.written += tokens
            if messages:
                await say(*(self._counted(served, message) for message in messages))
            if end is None:
                await self._pause(now)

    async def _pause(self, since: float) -> None:
        """With many streams, let tokens gather: a message costs the same whatever it carries."""
        seconds = pause_seconds(self.streams, self._messages_per_second) - (time.monotonic() - since)
        if seconds > 0:
            await asyncio.sleep(seconds)


def _events(*messages: dict[str, Any]) -> bytes:
    return b"".join(b"data: %b\n\n" % orjson.dumps(message) for message in messages)


def pause_seconds(streams: int, messages_per_second: float) -> float:
    """Seconds between the messages of one stream, so that all together send no more than so many."""
    return streams / messages_per_second if streams > 1 else 0.0
