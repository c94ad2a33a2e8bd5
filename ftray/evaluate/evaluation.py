"""`evaluate`: systems and baselines over the same rows: losses, answers, scores, intervals, tests.

    with resolved(["runs/cheese"]) as systems:
        result = evaluate(systems, task_of(systems), print)

Each base is loaded once: all that stands on it, its adapters and itself with any number of examples in front, answers
in one pass of the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ftray.config import Evaluation, Run
from ftray.data.encode import Vocabulary
from ftray.data.tokenizer import load_tokenizer
from ftray.errors import ConfigError, DataError
from ftray.evaluate.asking import OnEvent, Outcome, Task, ask_base
from ftray.evaluate.overlap import Overlap, overlap
from ftray.evaluate.questions import Asked, Examples, questions_of, read_rows, split_rows
from ftray.evaluate.scores.metric import Measured, Metric
from ftray.evaluate.scores.registry import opened
from ftray.evaluate.statistics import Difference, compare, interval, resamples
from ftray.evaluate.systems import BaseKey, System, baselines, own_names
from ftray.evaluate.worker import Worker, Workers

_TRAIN_ROWS = 100_000
"""Training rows that are looked at, at most: for examples, and for duplicates of held-out ones."""


@dataclass(frozen=True)
class Result:
    task: Task
    metrics: list[Metric]
    """Closed: for their names and units."""
    outcomes: list[Outcome]
    overlap: Overlap | None
    """None: there are no training rows to compare with."""
    differences: dict[tuple[str, str], dict[str, Difference | None]]
    """(system, other) → by metric, the system's less the other's."""
    seconds: float


def task_of(systems: Sequence[System], like: Run | None = None, settings: Evaluation | None = None) -> Task:
    """What to ask: as the run `like` says, else as the run of the first system that has one. `settings` take the place
    of the run's `evaluate`. Raises ConfigError where no run says anything."""
    run = like or next((system.run for system in systems if system.run is not None), None)
    if run is None:
        raise ConfigError(
            "none of these says what to ask",
            hint="name a run to evaluate as: --like RUN (a run file, a run's folder or a recipe)",
        )
    settings = settings or run.evaluate or Evaluation()
    train, held_out, missing = _rows_of(run, settings)
    rows = read_rows(settings.rows) if settings.rows else held_out
    if not rows:
        raise ConfigError(
            "there are no held-out rows to evaluate on",
            where="evaluate.rows",
            hint="give some there, or hold rows out with data.held_out or data.held_out_fraction",
        )
    questions = questions_of(rows, settings.limit)
    asked = {question.asked.key for question in questions}
    kept = [row for row in rows if row.key in asked][: settings.loss_rows]
    sources = settings.rows or run.data.held_out or run.data.sources
    return Task(settings, questions, kept, train, missing, sources, run.seed, run.name)


def _rows_of(run: Run, settings: Evaluation) -> tuple[list[Asked], list[Asked], str | None]:
    """(training rows, held-out rows, why there are no training rows). Raises DataError where rows are needed and are
    not there any more."""
    divided = bool(run.data.held_out_fraction)
    missing: str | None = None
    try:
        if divided:
            vocabulary = Vocabulary.of(load_tokenizer(run.model, run.data.chat_template))
            train, held_out = split_rows(run, vocabulary, _TRAIN_ROWS if settings.rows else None)
        else:
            train, held_out = read_rows(run.data.sources, _TRAIN_ROWS), []
    except DataError as error:
        if max(settings.examples, default=0) or (divided and not settings.rows):
            raise
        train, held_out, missing = [], [], error.what
    if run.data.held_out and not settings.rows:
        held_out = read_rows(run.data.held_out)
    return train, held_out, missing


def evaluate(systems: Sequence[System], task: Task, on_event: OnEvent, workers: Workers = Worker) -> Result:
    """Evaluate the systems and their baselines. `workers`: who computes. Raises UserError, RunError."""
    started, settings = time.perf_counter(), task.settings
    everyone = own_names([*baselines(systems, settings.examples), *systems])
    outcomes = {system.name: Outcome(system) for system in everyone}
    references = [question.references for question in task.questions]
    with ExitStack() as stack:
        metrics = stack.enter_context(opened(settings.metrics, references, settings.json_schema))
        examples = Examples(
            task.train, task.seed, similar=settings.choose == "similar" and max(settings.examples, default=0) > 0
        )
        by_base: dict[BaseKey | None, list[Outcome]] = {}
        for outcome in outcomes.values():
            by_base.setdefault(outcome.system.base, []).append(outcome)
        for key, group in by_base.items():
            if key is None:
                _ask_endpoints(group, task, on_event)
            else:
                ask_base(key, group, task, examples, workers, on_event)
        _score(list(outcomes.values()), metrics, task, on_event)
        differences = _differences(list(outcomes.values()), task)
    shared = overlap(task.train, task.rows) if task.train else None
    return Result(
        task,
        metrics,
        list(outcomes.values()),
        shared,
        differences,
        time.perf_counter() - started,
    )


# -------------------------------------------------------------------------------------------------------- endpoints


def _ask_endpoints(group: Sequence[Outcome], task: Task, on_event: OnEvent) -> None:
    """Answers over HTTP; there are no losses."""
    from ftray.evaluate.endpoint import Endpoint, ask_all

    if not task.settings.metrics:
        raise ConfigError(
            "an endpoint answers and tells no losses", where="evaluate.metrics", hint="name metrics to judge it by"
        )
    for outcome in group:
        on_event({"kind": "status", "text": f"asking {outcome.system.name}"})
        started = time.perf_counter()

        def told(count: int) -> None:
            on_event({"kind": "progress", "what": "answers", "done": count, "total": len(task.questions), "unit": ""})

        endpoint = Endpoint.of(outcome.system.where)
        asked = [question.asked for question in task.questions]
        outcome.answers = ask_all(endpoint, asked, task.settings.decoding, told)
        outcome.shown = [0] * len(asked)
        outcome.seconds = time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------- scores

LOSS = "loss"


def _score(outcomes: Sequence[Outcome], metrics: Sequence[Metric], task: Task, on_event: OnEvent) -> None:
    samples, seed = task.settings.samples, task.seed
    weights = resamples(len(task.questions), samples, seed)
    row_weights = resamples(len(task.rows), samples, seed)
    for outcome in outcomes:
        on_event({"kind": "status", "text": f"scoring {outcome.system.name}"})
        if outcome.loss is not None:
            outcome.measured[LOSS] = _as_measured(outcome)
            outcome.intervals[LOSS] = interval(outcome.measured[LOSS], row_weights)
        if outcome.answers:
            texts = [answer.text.strip() for answer in outcome.answers]
            for metric in metrics:
                outcome.measured[metric.name] = metric.measure(texts)
                outcome.intervals[metric.name] = interval(outcome.measured[metric.name], weights)


def _as_measured(outcome: Outcome) -> Measured:
    """Loss a target token, as sums over rows."""
    assert outcome.losses is not None
    assert outcome.target_tokens is not None
    stats = np.stack([np.ones_like(outcome.losses), outcome.losses, outcome.target_tokens], 1)
    by_row = outcome.losses / np.maximum(outcome.target_tokens, 1)
    return Measured(stats, lambda sums: sums[:, 1] / np.maximum(sums[:, 2], 1), by_row)


def _differences(outcomes: Sequence[Outcome], task: Task) -> dict[tuple[str, str], dict[str, Difference | None]]:
    """Each system against each that stands before it; with many, against the first alone."""
    found: dict[tuple[str, str], dict[str, Difference | None]] = {}
    weights = resamples(len(task.questions), task.settings.samples, task.seed)
    row_weights = resamples(len(task.rows), task.settings.samples, task.seed)
    for number, one in enumerate(outcomes):
        for other in outcomes[:number] if len(outcomes) <= _PAIRED else outcomes[: min(number, 1)]:
            shared = one.measured.keys() & other.measured.keys()
            found[one.system.name, other.system.name] = {
                name: compare(
                    one.measured[name], other.measured[name], row_weights if name == LOSS else weights, task.seed
                )
                for name in one.measured
                if name in shared
            }
    return found


_PAIRED = 5
"""Up to so many systems every pair is tested."""


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
