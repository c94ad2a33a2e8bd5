"""Adapters × tasks: what each run gained on its own task, and what it cost on the others and on general text.

One base reads each row once for each of its adapters, which gives the row's loss and the beginning of the answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftray.config import Decoding, Evaluation, Run, Source
from ftray.data.encode import Vocabulary
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ConfigError
from ftray.evaluate.answer import Answer
from ftray.evaluate.answers import Prompt
from ftray.evaluate.joint import OnEvent, losses_and_answers
from ftray.evaluate.losses import LossRow
from ftray.evaluate.questions import Asked, Prompter, Question, questions_of, read_rows, split_rows
from ftray.evaluate.scores.registry import expanded, opened
from ftray.evaluate.systems import BaseKey, System, baselines, own_names
from ftray.evaluate.worker import Computes, Worker, Workers
from ftray.redact import redact

GENERAL_ROWS = 200
"""Rows of general text whose loss is taken, at most."""


@dataclass(frozen=True)
class Column:
    """One task."""

    name: str
    rows: list[Asked]
    metric: str | None
    """None: losses alone."""
    decoding: Decoding
    limit: int | None = None
    """Questions that are asked, at most."""
    of: tuple[str, ...] = ()
    """The systems whose own task it is."""


@dataclass(frozen=True)
class Matrix:
    systems: list[System]
    """Rows: the bases first."""
    columns: list[Column]
    losses: np.ndarray
    """float64 [systems, columns], nats a target token; NaN where no row fits."""
    scores: np.ndarray
    """float64 [systems, columns]; NaN where a task has no metric."""
    own: list[int | None]
    """The column of each system's own task."""
    seconds: float

    def forgetting(self) -> np.ndarray:
        """float64 [systems, columns]: how much higher the loss is than that of the base that the system began as (the
        first row with the same base, else the first row)."""
        before = []
        for system in self.systems:
            same = (i for i, other in enumerate(self.systems) if other.kind == "base" and other.base == system.base)
            before.append(next(same, 0))
        return self.losses - self.losses[before]


def columns_of(systems: Sequence[System], general: Sequence[Source] = (), limit: int | None = None) -> list[Column]:
    """The held-out rows of each system's run (of runs that ask the same once), then the general texts. Raises
    ConfigError."""
    found: list[Column] = []
    tasks: list[tuple[Any, ...]] = []
    for system in systems:
        if system.run is None:
            continue
        if (task := _task(system.run)) in tasks:
            same = tasks.index(task)
            found[same] = replace(found[same], of=(*found[same].of, system.name))
            continue
        tasks.append(task)
        settings = system.run.evaluate or Evaluation()
        rows = _held_out(system.run, settings)
        if not rows:
            raise ConfigError("this run holds no rows out", where=system.name, hint="set data.held_out_fraction")
        metric = next(iter(expanded(settings.metrics)), None)
        found.append(Column(system.name, rows, metric, settings.decoding, limit or settings.limit, of=(system.name,)))
    ends = [source.path.rstrip("/").rsplit("/", 1)[-1] for source in general]
    for source, end in zip(general, ends, strict=True):
        alone = ends.count(end) == 1 and end not in [column.name for column in found]
        name = end if alone else redact(source.path)
        found.append(Column(name, read_rows([source], GENERAL_ROWS), None, Decoding(), limit))
    if not found:
        raise ConfigError("none of these has a run that says what its task is", hint="name runs, or artefacts of runs")
    return found


def _task(run: Run) -> tuple[Any, ...]:
    """Equal for runs that hold the same rows out and ask them in the same way."""
    settings = run.evaluate or Evaluation()
    asked = expanded(settings.metrics)[:1], settings.decoding, settings.limit
    if settings.rows or run.data.held_out:
        return settings.rows or run.data.held_out, asked
    divided = run.seed, run.data.held_out_fraction, run.model, run.data.chat_template  # by the rows' tokens
    return run.data.sources, asked, divided


def _held_out(run: Run, settings: Evaluation) -> list[Asked]:
    if settings.rows or run.data.held_out:
        return read_rows(settings.rows or run.data.held_out)
    return split_rows(run, Vocabulary.of(load_tokenizer(run.model, run.data.chat_template)))[1]


def cross(systems: Sequence[System], columns: Sequence[Column], on_event: OnEvent, workers: Workers = Worker) -> Matrix:
    """Every system, and the bases before them, on every task. `workers`: who computes. Raises ConfigError for an
    endpoint, which tells no losses, and for beams."""
    started = time.perf_counter()
    if endpoint := next((system for system in systems if system.base is None), None):
        raise ConfigError("an endpoint tells no losses", where=endpoint.name, hint="name runs or adapters")
    if any(column.decoding.beams > 1 for column in columns):
        raise ConfigError("a matrix is answered by the engine, which has no beams", where="evaluate.decoding.beams")
    bases = baselines(systems, [0])
    everyone = own_names([*bases, *systems])
    shape = len(everyone), len(columns)
    losses, scores = np.full(shape, np.nan), np.full(shape, np.nan)
    groups: dict[BaseKey, list[int]] = {}
    for i, system in enumerate(everyone):
        assert system.base is not None
        groups.setdefault(system.base, []).append(i)
    for key, members in groups.items():
        on_event({"kind": "status", "text": f"loading {key.model.path} for {len(members)} systems"})
        own = [everyone[i] for i in members]
        with closing(workers(key, own)) as worker:
            group = _Group(key, worker, own, columns)
            losses[members], scores[members] = group.losses_and_scores(on_event)
    owned = {name: i for i, column in enumerate(columns) for name in column.of}
    tasks = [*[None for _ in bases], *(owned.get(system.name) for system in systems)]
    return Matrix(everyone, list(columns), losses, scores, tasks, time.perf_counter() - started)


class _Group:
    """All that stands on one base."""

    def __init__(self, key: BaseKey, worker: Computes, systems: list[System], columns: Sequence[Column]) -> None:
        self.worker, self.systems, self.columns = worker, systems, columns
        self.positions, self.virtual = worker.positions(), worker.virtual_tokens()
        templates = {system.chat_template for system in systems}
        self.prompters = {t: Prompter(Vocabulary.of(load_tokenizer(key.model, t))) for t in templates}

    def losses_and_scores(self, on_event: OnEvent) -> tuple[np.ndarray, np.ndarray]:
        """[systems, columns] each."""
        rows, cells = self._rows()
        asked = [questions_of(column.rows, column.limit) if column.metric else [] for column in self.columns]
        prompts = self._prompts(asked)
        most = max((column.decoding.max_tokens for column in self.columns if column.metric), default=1)
        decoding = self.columns[0].decoding.model_copy(update={"max_tokens": most})
        losses, answers = losses_and_answers(self.worker, rows, prompts, decoding, on_event)
        sums, targets = (np.zeros((len(self.systems), len(self.columns))) for _ in range(2))
        for cell, row, loss in zip(cells, rows, losses, strict=True):
            sums[cell] += loss
            targets[cell] += row.targets.sum()
        with np.errstate(invalid="ignore"):
            return np.where(targets > 0, sums / targets, np.nan), self._scores(asked, answers)

    def _rows(self) -> tuple[list[LossRow], list[tuple[int, int]]]:
        """(rows whose losses are taken, the cell that each belongs to)."""
        rows: list[LossRow] = []
        cells: list[tuple[int, int]] = []
        for j, column in enumerate(self.columns):
            for template, prompter in self.prompters.items():
                encoded = prompter.encoded([prompter.whole(row) for row in column.rows])
                for i, system in enumerate(self.systems):
                    if system.chat_template != template:
                        continue
                    places = self.positions - self.virtual[system.key]
                    for tokens, targets in encoded:
                        if targets[:places].any():
                            rows.append(LossRow(system.key, tokens[:places], targets[:places]))
                            cells.append((i, j))
        return rows, cells

    def _prompts(self, asked: Sequence[Sequence[Question]]) -> list[Prompt]:
        """Of one system after the other: a batch then holds few adapters, each for many tokens."""
        prompts: list[Prompt] = []
        tokens = {
            template: [[prompter.tokens(question.asked) for question in questions] for questions in asked]
            for template, prompter in self.prompters.items()
        }
        for system in self.systems:
            for column, own in zip(self.columns, tokens[system.chat_template], strict=True):
                prompts += [Prompt(system.key, t, n, decoding=column.decoding) for n, t in enumerate(own)]
        return prompts

    def _scores(self, asked: Sequence[Sequence[Question]], answers: Sequence[Answer]) -> np.ndarray:
        """[systems, columns]"""
        each = iter(answers)
        said = [[[next(each).text.strip() for _ in questions] for questions in asked] for _ in self.systems]
        found = np.full((len(self.systems), len(self.columns)), np.nan)
        for j, (column, questions) in enumerate(zip(self.columns, asked, strict=True)):
            if not column.metric:
                continue
            with opened([column.metric], [question.references for question in questions]) as [metric]:
                found[:, j] = [metric.measure(texts[j]).score for texts in said]
        return found


def general_sources(paths: Sequence[str]) -> list[Source]:
    """Plain text files, a row a line; or JSONL with a column `text`."""
    return [Source.model_validate({"path": path, "format": "text"}) for path in paths]


def matrix_json(matrix: Matrix) -> dict[str, Any]:
    """As plain values; None where there is nothing."""

    def plain(values: np.ndarray) -> list[list[float | None]]:
        return [[None if np.isnan(value) else round(float(value), 6) for value in row] for row in values]

    return {
        "format": 1,
        "systems": [
            {"name": s.name, "kind": s.kind, "own": own} for s, own in zip(matrix.systems, matrix.own, strict=True)
        ],
        "tasks": [{"name": c.name, "metric": c.metric, "rows": len(c.rows)} for c in matrix.columns],
        "losses": plain(matrix.losses),
        "scores": plain(matrix.scores),
        "forgetting": plain(matrix.forgetting()),
        "seconds": round(matrix.seconds, 2),
    }
