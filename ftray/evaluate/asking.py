"""What stands on one base: the losses and answers of all of it, which one reading gives where it can."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ftray.config import Evaluation, Source
from ftray.data.encode import Vocabulary
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import UserError
from ftray.evaluate.answer import Answer
from ftray.evaluate.answers import Prompt
from ftray.evaluate.joint import OnEvent, losses_and_answers
from ftray.evaluate.losses import LossRow
from ftray.evaluate.questions import BETWEEN, Asked, Examples, Prompter, Question
from ftray.evaluate.scores.metric import Measured
from ftray.evaluate.statistics import Interval
from ftray.evaluate.systems import BaseKey, System
from ftray.evaluate.worker import Workers


@dataclass(frozen=True)
class Task:
    """What all systems are asked."""

    settings: Evaluation
    questions: list[Question]
    rows: list[Asked]
    """Each row with its own answer: what losses are taken of."""
    train: list[Asked]
    """Training rows, the first of them: for examples in prompts, and to see which held-out rows are among them."""
    train_missing: str | None
    """Why there are none."""
    sources: list[Source]
    seed: int
    name: str


@dataclass
class Outcome:
    """One system's part of the result."""

    system: System
    answers: list[Answer] = field(default_factory=list)
    losses: np.ndarray | None = None
    """Sum of each row's targets in nats; None where none can be taken."""
    target_tokens: np.ndarray | None = None
    skipped_rows: int = 0
    """Rows too long for this base."""
    shown: list[int] = field(default_factory=list)
    """Examples that fitted in front of each question."""
    measured: dict[str, Measured] = field(default_factory=dict)
    intervals: dict[str, Interval | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        if self.losses is None or self.target_tokens is None or not self.target_tokens.sum():
            return None
        return float(self.losses.sum() / self.target_tokens.sum())


def ask_base(
    key: BaseKey, group: Sequence[Outcome], task: Task, examples: Examples, workers: Workers, on_event: OnEvent
) -> None:
    """Fill in the losses and answers of all that stand on one base. Raises UserError, RunError."""
    started = time.perf_counter()
    names = ", ".join(outcome.system.name for outcome in group)
    on_event({"kind": "status", "text": f"loading {key.model.path} for {names}"})
    asking = _Asking(key, group, task, examples, workers, on_event)
    try:
        asking.ask()
    finally:
        asking.worker.close()
    for outcome in group:
        outcome.seconds = time.perf_counter() - started


class _Asking:
    """One base, and what it is asked for all that stand on it."""

    def __init__(
        self,
        key: BaseKey,
        group: Sequence[Outcome],
        task: Task,
        examples: Examples,
        workers: Workers,
        on_event: OnEvent,
    ) -> None:
        self.group, self.task, self.examples, self.on_event = group, task, examples, on_event
        self.worker = workers(key, [outcome.system for outcome in group])
        self.positions, self.virtual = self.worker.positions(), self.worker.virtual_tokens()
        templates = {outcome.system.chat_template for outcome in group}
        self.prompters = {t: Prompter(Vocabulary.of(load_tokenizer(key.model, t))) for t in templates}

    def ask(self) -> None:
        rows, owners = self._rows()
        decoding = self.task.settings.decoding
        prompts = self._prompts(decoding.max_tokens) if self.task.settings.metrics else []
        losses, answers = losses_and_answers(self.worker, rows, prompts, decoding, self.on_event)
        for outcome in self.group:
            outcome.losses = np.zeros(len(self.task.rows))
        for (outcome, i), loss in zip(owners, losses, strict=True):
            assert outcome.losses is not None
            outcome.losses[i] = loss
        each = len(self.task.questions)
        for number, outcome in enumerate(self.group):
            outcome.answers = answers[number * each : (number + 1) * each]

    def _rows(self) -> tuple[list[LossRow], list[tuple[Outcome, int]]]:
        """(rows whose losses are taken, which row of whose each is)."""
        rows: list[LossRow] = []
        owners: list[tuple[Outcome, int]] = []
        for outcome in self.group:
            system, prompter = outcome.system, self.prompters[outcome.system.chat_template]
            places = self.positions - self.virtual[system.key]
            outcome.target_tokens = np.zeros(len(self.task.rows))
            rendered = [prompter.whole(row, self._fitting(row, system, 0)[0]) for row in self.task.rows]
            for i, (tokens, targets) in enumerate(prompter.encoded(rendered)):
                if len(tokens) > places or not targets.any():
                    outcome.skipped_rows += 1
                    continue
                outcome.target_tokens[i] = targets.sum()
                rows.append(LossRow(system.key, tokens, targets))
                owners.append((outcome, i))
        return rows, owners

    def _prompts(self, answer: int) -> list[Prompt]:
        """Of each system in turn, room for `answer` tokens behind each."""
        prompts: list[Prompt] = []
        for outcome in self.group:
            system = outcome.system
            places = self.positions - self.virtual[system.key]
            for number, question in enumerate(self.task.questions):
                shown, tokens = self._fitting(question.asked, system, answer)
                if len(tokens) + answer > places:
                    raise UserError(
                        f"a prompt has {len(tokens):,} tokens; with {answer:,} of the answer it is longer"
                        f" than the {places:,} places that {system.name} has",
                        where=question.asked.where,
                        hint="lower evaluate.decoding.max_tokens, or leave this row out",
                    )
                stop = (BETWEEN,) if shown and question.asked.messages is None else ()
                outcome.shown.append(len(shown))
                prompts.append(Prompt(system.key, tokens, number, stop))
        return prompts

    def _fitting(self, row: Asked, system: System, answer: int) -> tuple[list[Asked], tuple[int, ...]]:
        """(the examples in front of `row`, the prompt's tokens): as many examples as were asked for, or as fit. With
        `answer` 0 the row's own answer must fit too."""
        prompter = self.prompters[system.chat_template]
        places = self.positions - self.virtual[system.key]
        shown = self.examples.of(row, system.examples) if system.examples else []
        while True:
            if answer:
                tokens = prompter.tokens(row, shown)
                fits = len(tokens) + answer <= places
            else:
                tokens = ()
                fits = not shown or len(prompter.encoded([prompter.whole(row, shown)])[0][0]) <= places
            if fits or not shown:
                return shown, tokens
            shown = shown[1:]
