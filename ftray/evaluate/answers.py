"""Answers: what systems write when they are asked. One base answers for all its adapters in one pass of the engine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ftray.config import Decoding
from ftray.engine.engine import Engine
from ftray.engine.options import EngineOptions
from ftray.engine.request import Chunk, Finished, Request, Sampling, Usage
from ftray.errors import FtrayError, RequestError, RunError
from ftray.evaluate.answer import Answer
from ftray.model.served import Adapter, Base
from ftray.registry.ref import Ref

SLOTS = {"cpu": 128, "cuda": 128}
STEP_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Of one step, prompts included. An endpoint reads prompts in small pieces, so that nobody's answer stalls; here nobody
waits for a token. Measured, 600 short prompts for 25 adapters on the embedded base, CPU seconds of one thread: 7.2 with
the endpoint's options, 2.9 with these."""
KV_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}
"""Of keys and values, at most: long contexts get fewer slots."""
_AHEAD = 4
"""Requests in flight are this many times the slots: prompts of one adapter then find each other's beginnings."""


@dataclass(frozen=True)
class Prompt:
    """One request: which adapter is asked what."""

    adapter: str | None
    """Key in the adapters; None: the base alone."""
    tokens: tuple[int, ...]
    number: int = 0
    """Of the question. Draws come from it and the decoding's seed, not from what is asked beside it."""
    stop: tuple[str, ...] = ()
    decoding: Decoding | None = None
    """Its own; None: that of all."""
    expected: tuple[int, ...] = ()
    """As in a Request: it is told how probable these are, and the answer stays what it is."""


def answers_of(
    base: Base,
    adapters: Mapping[str, Adapter],
    prompts: Iterable[Prompt],
    decoding: Decoding,
    *,
    longest: int,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answer to each prompt, in order, written by one engine on `base`, which must have no other. `longest` is the
    longest prompt in tokens, virtual ones of its adapter included. `decoding` allows as many tokens as any prompt's own
    does; no prompt with what is expected is longer than both together. Raises RunError when a request fails."""
    options = bulk_options(base, longest + decoding.max_tokens, adapters=len(adapters) or 1)
    engine = Engine(base, lambda ref: adapters[ref.digest], options)
    answers: list[Answer] = []
    try:
        for count, (end, text) in enumerate(answered(engine, _requests(prompts, decoding, answers)), 1):
            if end.error is not None:
                raise _failed(end.error)
            answer = answers[int(end.id)]
            answer.text, answer.reason, answer.tokens = text, end.reason, end.usage.completion_tokens
            answer.expected = end.expected
            done(count)
        return answers
    finally:
        engine.close()


def bulk_options(base: Base, context: int, *, slots: int | None = None, adapters: int | None = None) -> EngineOptions:
    """Of an engine for whose tokens nobody waits. `slots`: None for as many as there is room for."""
    device = base.model.device.type
    if slots is None:
        slots = max(1, min(SLOTS[device], KV_BYTES[device] // (context * _token_bytes(base))))
    most = _AHEAD * slots
    step = max(STEP_TOKENS[device], 2 * slots)
    return EngineOptions(
        slots=slots,
        context=context,
        step_tokens=step,
        prompt_tokens=step,
        queue=most,
        tenant_queue=most,
        adapters=adapters,
    )


def answered(engine: Engine, requests: Iterator[Request]) -> Iterator[tuple[Finished, str]]:
    """(last event, whole text) of each request, as they end. A request that can never be answered ends at once, with
    its error."""
    most = _AHEAD * engine.options.slots
    pieces: dict[str, list[str]] = defaultdict(list)
    more = True
    while more or engine.in_flight():
        while more and engine.in_flight() < most:
            request = next(requests, None)
            if request is None:
                more = False
                break
            try:
                engine.add(request)
            except RequestError as error:
                yield Finished(request.id, "error", Usage(len(request.prompt), 0, 0), error), ""
        if not engine.in_flight():
            continue
        engine.wait(1)
        for event in engine.step():
            if isinstance(event, Chunk):
                pieces[event.id].append(event.text)
            else:
                yield event, "".join(pieces.pop(event.id, []))


def seed_of(seed: int, number: int) -> int:
    """Of the draws of one answer: the same in whatever batch it is written."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest(), "little") >> 1


def _token_bytes(base: Base) -> int:
    """Of one token's keys and values in all layers."""
    config = base.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * base.model.dtype.itemsize


def _requests(prompts: Iterable[Prompt], decoding: Decoding, answers: list[Answer]) -> Iterator[Request]:
    for number, prompt in enumerate(prompts):
        answers.append(Answer(prompt_tokens=len(prompt.tokens)))
        own = prompt.decoding or decoding
        sampling = Sampling(
            max_tokens=own.max_tokens,
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=own.top_k,
            seed=seed_of(own.seed, prompt.number),
            stop=(*own.stop, *prompt.stop),
        )
        adapter = None if prompt.adapter is None else Ref("evaluate", "evaluate", prompt.adapter)
        yield Request(str(number), prompt.tokens, sampling, adapter, "evaluate", prompt.expected)


def _failed(error: FtrayError) -> RunError:
    wrapped = RunError(f"an answer failed: {error.what}", where=error.where, hint=error.hint)
    wrapped.__cause__ = error
    return wrapped
