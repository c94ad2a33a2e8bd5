"""Answers: what systems write when they are asked. One base answers for all its adapters in one pass of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ftray.config import Decoding
from ftray.engine.engine import Engine
from ftray.engine.options import EngineOptions
from ftray.engine.request import Chunk, Request, Sampling
from ftray.errors import FtrayError, RunError
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


@dataclass
class Answer:
    text: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    """Written."""
    reason: str = ""
    """`stop`, or `length` where `max_tokens` cut it off."""
    _pieces: list[str] = field(default_factory=list, repr=False)


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
        waiting = _requests(prompts, decoding, answers)
        finished = 0
        _fill(engine, waiting, most)
        while engine.in_flight():
            engine.wait(1)
            for event in engine.step():
                answer = answers[int(event.id)]
                if isinstance(event, Chunk):
                    answer._pieces.append(event.text)
                    continue
                if event.error is not None:
                    raise _failed(event.error)
                answer.text = "".join(answer._pieces)
                answer.reason, answer.tokens = event.reason, event.usage.completion_tokens
                done(finished := finished + 1)
            _fill(engine, waiting, most)
        return answers
    finally:
        engine.close()


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


def _fill(engine: Engine, waiting: Iterator[Request], most: int) -> None:
    while engine.in_flight() < most:
        request = next(waiting, None)
        if request is None:
            return
        engine.add(request)


def _failed(error: FtrayError) -> RunError:
    wrapped = RunError(f"an answer failed: {error.what}", where=error.where, hint=error.hint)
    wrapped.__cause__ = error
    return wrapped
