"""A worker of an evaluation: one base with the adapters of the systems that stand on it. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ftray.config import Decoding
from ftray.errors import ArtefactError
from ftray.evaluate.answer import Answer
from ftray.evaluate.answers import Prompt, answers_of
from ftray.evaluate.losses import LossRow, row_losses
from ftray.evaluate.systems import BaseKey, System, read_adapters, resolved

if TYPE_CHECKING:
    from ftray.evaluate.beams import Searcher

Done = Callable[[int], None]
"""Told how many rows or prompts there are results for."""


class Computes(Protocol):
    """What a worker does, or several in its place."""

    def close(self) -> None: ...

    def virtual_tokens(self) -> dict[str | None, int]: ...

    def positions(self) -> int: ...

    def losses(self, rows: Sequence[LossRow], done: Done = ...) -> np.ndarray: ...

    def answers(
        self, prompts: Sequence[Prompt], decoding: Decoding, longest: int, done: Done = ...
    ) -> list[Answer]: ...


Workers = Callable[[BaseKey, Sequence[System]], Computes]
"""Makes what computes for systems on one base."""


class Worker:
    """Raises UserError where the base or an adapter cannot be had here."""

    def __init__(self, key: BaseKey, systems: Sequence[System], registry: str | None = None) -> None:
        self._key = key
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.base = key.loaded(device)
        self._stack = ExitStack()
        own = [_here(system, registry, self._stack) for system in systems]
        self._folders = {system.key: system.folder for system in own if system.key and system.folder}
        self._adapters = read_adapters(self.base, own)

    def close(self) -> None:
        """Adapters of a registry need not stay in the cache any longer."""
        self._stack.close()

    def virtual_tokens(self) -> dict[str | None, int]:
        """Places that each adapter takes of every row, by its key."""
        return {None: 0} | {key: adapter.virtual_tokens for key, adapter in self._adapters.items()}

    def positions(self) -> int:
        """Tokens that a row may have, virtual ones included."""
        return getattr(self.base.config, "max_position_embeddings", None) or 4096

    def losses(self, rows: Sequence[LossRow], done: Done = lambda count: None) -> np.ndarray:
        """As `row_losses`."""
        return row_losses(self.base, self._adapters, rows, done)

    def answers(
        self, prompts: Sequence[Prompt], decoding: Decoding, longest: int, done: Done = lambda count: None
    ) -> list[Answer]:
        """As `answers_of`; beams go through transformers."""
        if decoding.beams == 1:
            return answers_of(self.base, self._adapters, prompts, decoding, longest=longest, done=done)
        return self._searcher.answers(prompts, decoding, done)

    @cached_property
    def _searcher(self) -> Searcher:
        """Kept: prompts come a few hundred at a time where there are several workers."""
        from ftray.evaluate.beams import Searcher

        return Searcher(self._key, self._folders, self.base.model.device)


def _here(system: System, registry: str | None, stack: ExitStack) -> System:
    """The system with its adapter's files on this machine: they may have been fetched on another one only."""
    if system.folder is None or system.folder.is_dir():
        return system
    [found] = stack.enter_context(resolved([system.where], registry))
    if found.key != system.key:
        raise ArtefactError("this adapter has changed since the evaluation began", where=system.where)
    return replace(system, folder=found.folder)
