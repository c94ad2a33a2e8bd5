"""Answers: what systems write when they are asked. One base answers for all its adapters in one pass of the engine."""

from __future__ import annotations

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

SLOTS = {"cpu": 32, "cuda": 128}
_AHEAD = 4
"""Requests in flight are this many times the slots: prompts of one adapter then find each other's beginnings."""


@dataclass(frozen=True)
class Prompt:
    """One request: which adapter is asked what."""

    adapter: str | None
    """Key in the adapters; None: the base alone."""
    tokens: tuple[int, ...]
    stop: tuple[str, ...] = ()
    decoding: Decoding | None = None
    """Its own; None: that of all."""


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
    longest prompt in tokens, virtual ones of its adapter included; `decoding` allows as many tokens as any prompt's own
    does. Raises RunError when a request fails."""
    slots = SLOTS[base.model.device.type]
    most = _AHEAD * slots
    options = EngineOptions(
        slots=slots, context=longest + decoding.max_tokens, queue=most, tenant_queue=most, adapters=len(adapters) or 1
    )
    engine = Engine(base, lambda ref: adapters[ref.digest], options)
    answers: list[Answer] = []
    try:
        for count, (end, text) in enumerate(answered(engine, _requests(prompts, decoding, answers), most), 1):
            if end.error is not None:
                raise _failed(end.error)
            answer = answers[int(end.id)]
            answer.text, answer.reason, answer.tokens = text, end.reason, end.usage.completion_tokens
            done(count)
        return answers
    finally:
        engine.close()


def answered(engine: Engine, requests: Iterator[Request], most: int) -> Iterator[tuple[Finished, str]]:
    """(last event, whole text) of each request, as they end, with up to `most` in flight. A request that can never be
    answered ends at once, with its error."""
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


def _requests(prompts: Iterable[Prompt], decoding: Decoding, answers: list[Answer]) -> Iterator[Request]:
    for number, prompt in enumerate(prompts):
        answers.append(Answer(prompt_tokens=len(prompt.tokens)))
        own = prompt.decoding or decoding
        sampling = Sampling(
            max_tokens=own.max_tokens,
            temperature=own.temperature,
            top_p=own.top_p,
            top_k=own.top_k,
            seed=own.seed + number,
            stop=(*own.stop, *prompt.stop),
        )
        adapter = None if prompt.adapter is None else Ref("evaluate", "evaluate", prompt.adapter)
        yield Request(str(number), prompt.tokens, sampling, adapter, "evaluate")


def _failed(error: FtrayError) -> RunError:
    wrapped = RunError(f"an answer failed: {error.what}", where=error.where, hint=error.hint)
    wrapped.__cause__ = error
    return wrapped
