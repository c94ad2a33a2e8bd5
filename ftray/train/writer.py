"""Commits beside the loop: a copy of what they hold is taken between two steps, and written while the loop goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from ftray.model.free import free_memory
from ftray.storage import StoreSilent
from ftray.train import commits
from ftray.train.commits import Commit, Lazy, State

_PAUSES = (5.0, 20.0, 60.0)
"""Seconds before a commit is tried again that a silent store did not take, though its driver had asked again."""
_SHARE_OF_FREE_MEMORY = 0.5
"""What a copy may take of it; a larger one goes to the disk at once, a tensor at a time."""
_NICENESS = 10
"""Of the thread that writes: where it shares the processor with the loop, the loop comes first."""


_T = TypeVar("_T")


class Writer:
    """Writes the commits of a run's folder, one at a time. Its methods belong to one thread, the loop's.

    A commit counts once its manifest is there, which comes last; until then a killed run goes on from the one before.
    What goes wrong on the other thread is raised by the next call here, so that no run goes on without commits.
    """

    def __init__(self, folder: str, warn: Callable[[str], None]) -> None:
        """`warn` is called on the loop's thread."""
        self.folder, self._warn = folder, warn
        self._pool = ThreadPoolExecutor(1, "ftray-commit", initializer=_stand_back)
        self._under_way: Future[str] | None = None
        self._step = 0
        self._troubles: list[str] = []
        self._given_up = threading.Event()

    @property
    def busy(self) -> bool:
        """Whether a commit is under way, or nobody was told yet that it counts."""
        return self._under_way is not None

    def begin(self, commit: Commit, *, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Take what `commit` holds, and begin to write it: on the other thread `before`, the commit, `after`. None may
        be under way. Raises RunError where the disk does not take it."""
        assert self._under_way is None, "wait for the commit before"
        self._step = commit.progress.step
        held = in_memory(commit.state)
        staged = None if held else commits.stage(self.folder, commit)
        copied = replace(commit, progress=replace(commit.progress), state=held or commit.state)

        def write() -> str:
            files = staged
            try:
                self._insisting(before)
                files = files or commits.stage(self.folder, copied)
                where = self._insisting(partial(commits.complete, files))
            finally:
                if files:
                    files.discard()
            self._insisting(after)
            return where

        self._under_way = self._pool.submit(write)

    def done(self, *, wait: bool = False) -> tuple[int, str] | None:
        """(step, folder) of the commit that was under way, once, when it counts; None while it does not, unless it is
        waited for, and where there is none. Raises its error."""
        while self._troubles:
            self._warn(self._troubles.pop(0))
        if self._under_way is None or not (wait or self._under_way.done()):
            return None
        future, self._under_way = self._under_way, None
        where = future.result()
        return self._step, where

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        """Let what is under way end. After an error of the loop, one of the commit is noted with it."""
        self._given_up.set()
        self._pool.shutdown()
        if self._under_way and (also := self._under_way.exception()):
            if error is None:
                raise also
            error.add_note(f"the commit of step {self._step:,} was not written either: {also}")

    def _insisting(self, work: Callable[[], _T]) -> _T:
        for pause in _PAUSES:
            try:
                return work()
            except StoreSilent as error:
                trouble = (
                    f"the commit of step {self._step:,} waits for its store, next try in {pause:g} s: {error.what}"
                )
                self._troubles.append(trouble)
                self._given_up.wait(pause)
        return work()


def in_memory(state: State) -> State | None:
    """A copy of the state in this machine's memory. None where its tensors are still to be gathered, or the memory has
    no room."""
    if isinstance(state.model, Lazy) or isinstance(state.optimizer, Lazy):
        return None
    tensors = [*state.model.values(), *state.optimizer.values()]
    if sum(tensor.nbytes for tensor in tensors) > _SHARE_OF_FREE_MEMORY * free_memory():
        return None
    model, optimizer = (
        {name: _copied(tensor) for name, tensor in part.items()} for part in (state.model, state.optimizer)
    )
    return State(model, optimizer, dict(state.plain))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _stand_back() -> None:
    """Lower this thread's priority: on Linux it is the thread's own, elsewhere the process's, which is left alone."""
    if hasattr(os, "sched_setscheduler"):  # Linux
        identity = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, identity, os.getpriority(os.PRIO_PROCESS, identity) + _NICENESS)
