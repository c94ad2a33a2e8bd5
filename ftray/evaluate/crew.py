"""Workers of an evaluation on Ray: actors that each hold the base, and take the rows a few hundred at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np

from ftray.config import Decoding
from ftray.errors import FtrayError, RunError
from ftray.evaluate.answer import Answer
from ftray.evaluate.answers import Prompt
from ftray.evaluate.generator import use_cores
from ftray.evaluate.losses import LossRow
from ftray.evaluate.places import OnEvent, first, share
from ftray.evaluate.systems import BaseKey, System
from ftray.evaluate.worker import Done, Worker
from ftray.session import cause_of

_AT_ONCE = 256
"""Rows or prompts that a worker takes at a time, at least: a few passes of it."""
_PARTS = 8
"""Of a worker's share, where there is more than that: each part ends with passes that are not full, and with the last
ones somebody waits for the others."""
_RESTARTS = 3


class _Actor:
    """Holds a worker from the first call on: what is wrong with a base or an adapter is then that call's error, and not
    the death of an actor; and one that was started again has its worker again."""

    def __init__(self, cpus: int, *worker: Any) -> None:
        use_cores(cpus)
        self._make = partial(Worker, *worker)

    @cached_property
    def _worker(self) -> Worker:
        return self._make()

    def arrived(self) -> None:
        """Answered as soon as there is a place for it."""

    def about(self) -> tuple[dict[str | None, int], int]:
        return self._worker.virtual_tokens(), self._worker.positions()

    def losses(self, rows: Sequence[LossRow]) -> np.ndarray:
        return self._worker.losses(rows)

    def answers(self, prompts: Sequence[Prompt], decoding: Decoding, longest: int) -> list[Answer]:
        return self._worker.answers(prompts, decoding, longest)


class Crew:
    """Several workers in the place of one, with its methods. The first that has a place begins, and the others join it
    as they get theirs. A worker that dies is started again and does its share again. Raises UserError as `Worker` does,
    RunError when there is no place for any in time, or a worker was lost too often."""

    def __init__(
        self,
        key: BaseKey,
        systems: Sequence[System],
        *,
        count: int | None = None,
        registry: str | None = None,
        on_event: OnEvent = lambda event: None,
    ) -> None:
        """`count`: of workers; None for one a GPU, or a machine."""
        import ray

        number, resources = share(count)
        each: dict[str, Any] = {"max_restarts": _RESTARTS, "max_task_retries": _RESTARTS, **resources}
        actor: Any = ray.remote(**each)(_Actor)  # type: ignore[call-overload]
        self._actors = [actor.remote(resources["num_cpus"], key, list(systems), registry) for _ in range(number)]
        self._waiting = {actor.arrived.remote(): actor for actor in self._actors}
        self._here: list[Any] = []
        try:
            with _told():
                one = self._join(first(list(self._waiting), resources, on_event))
                self._virtual, self._positions = ray.get(one.about.remote())
        except BaseException:
            self.close()
            raise
        if self._waiting:
            arrived, missing = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0)
            text = f"{1 + len(arrived)} of {number} workers are there; the others join as they get a place"
            if missing:
                on_event({"kind": "status", "text": text})

    def _join(self, reference: Any) -> Any:
        """The worker that has arrived."""
        import ray

        ray.get(reference)
        self._here.append(actor := self._waiting.pop(reference))
        return actor

    def close(self) -> None:
        """End the workers."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def virtual_tokens(self) -> dict[str | None, int]:
        return self._virtual

    def positions(self) -> int:
        return self._positions

    def losses(self, rows: Sequence[LossRow], done: Done = lambda count: None) -> np.ndarray:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))  # rows of like length together
        found = np.zeros(len(rows))
        for chosen, sums in self._spread(order, lambda actor, few: actor.losses.remote([rows[i] for i in few]), done):
            found[chosen] = sums
        return found

    def answers(
        self, prompts: Sequence[Prompt], decoding: Decoding, longest: int, done: Done = lambda count: None
    ) -> list[Answer]:
        found: list[Answer | None] = [None] * len(prompts)
        each = self._spread(
            range(len(prompts)),  # in order: prompts of one system find each other's beginnings
            lambda actor, few: actor.answers.remote([prompts[i] for i in few], decoding, longest),
            done,
        )
        for chosen, answers in each:
            for i, answer in zip(chosen, answers, strict=True):
                found[i] = answer
        return found  # type: ignore[return-value]

    def _spread(
        self, order: Sequence[int], ask: Callable[[Any, Sequence[int]], Any], done: Done
    ) -> Iterator[tuple[list[int], Any]]:
        """(places, what was asked of them), as workers get done with them."""
        import ray

        most = -(-len(order) // len(self._actors))
        size = max(1, min(max(_AT_ONCE, -(-most // _PARTS)), most))
        left = [list(order[start : start + size]) for start in range(0, len(order), size)][::-1]
        free, count = list(self._here), 0
        running: dict[Any, tuple[Any, list[int]]] = {}
        with _told():
            while left or running:
                while left and free:
                    actor, few = free.pop(), left.pop()
                    running[ask(actor, few)] = actor, few
                [reference], _ = ray.wait([*self._waiting, *running])
                if reference in self._waiting:
                    free.append(self._join(reference))
                    continue
                actor, few = running.pop(reference)
                yield few, ray.get(reference)
                free.append(actor)
                done(count := count + len(few))


@contextmanager
def _told() -> Iterator[None]:
    """The first real cause, instead of what Ray put around it."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause = cause_of(error)
        if isinstance(cause, FtrayError):
            raise cause from None
        raise RunError(f"a worker failed: {' '.join(str(error).split())[-300:]}") from error
