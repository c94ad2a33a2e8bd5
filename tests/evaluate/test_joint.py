"""Losses and answers from one reading are those of a pass for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ftray.config import Decoding
from ftray.evaluate.answers import Prompt
from ftray.evaluate.joint import losses_and_answers
from ftray.evaluate.losses import LossRow
from ftray.evaluate.systems import System, resolved
from ftray.evaluate.worker import Worker
from tests.evaluate.runs import cheese_run
from tests.toys import cheese_rows

GREEDY = Decoding(max_tokens=64)
DRAWN = Decoding(max_tokens=64, temperature=1.2, seed=3)


class Counting(Worker):
    """One that keeps how many rows it was given."""

    rows = 0

    def losses(self, rows, done=lambda count: None):
        self.rows += len(rows)
        return super().losses(rows, done)


@pytest.fixture(scope="module")
def systems(tmp_path_factory) -> Iterator[list[System]]:
    folders: list[Path] = []
    for name, method in (("lora", "{name: lora, rank: 4}"), ("prefix", "{name: prefix, tokens: 6}")):
        folders.append(tmp_path_factory.mktemp(name))
        cheese_run(folders[-1], method, steps=3)
    with resolved([str(folder) for folder in folders]) as found:
        yield found


@pytest.fixture
def worker(systems) -> Iterator[Counting]:
    made = Counting(systems[0].base, systems)
    yield made
    made.close()


@pytest.fixture
def rows(systems) -> list[LossRow]:
    """Of the base and of two adapters."""
    keys = [None, *(system.key for system in systems)]
    return [LossRow(key, row.tokens, row.targets) for row in cheese_rows(6) for key in keys]


def prompts_of(rows: list[LossRow]) -> list[Prompt]:
    """What is asked before each row's targets."""
    return [Prompt(row.adapter, tuple(row.tokens[: row.targets.argmax()].tolist())) for row in rows]


@pytest.mark.parametrize("decoding", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_each_loss_and_each_answer_is_its_own(worker, rows, decoding):
    expected, said = worker.losses(rows), worker.answers(prompts_of(rows), decoding, 200)
    worker.rows = 0
    losses, answers = losses_and_answers(worker, rows, prompts_of(rows), decoding, lambda event: None)
    assert worker.rows == 0, "all were read with their prompts"
    assert losses == pytest.approx(expected, rel=1e-4)
    assert [answer.text for answer in answers] == [answer.text for answer in said]
    assert [(answer.tokens, answer.reason) for answer in answers] == [(a.tokens, a.reason) for a in said]


def test_rows_that_no_prompt_is_for_are_read_by_themselves(worker, rows):
    """A second answer to the same question, targets in two places, another adapter, a row that is not asked about."""
    second = replace(
        rows[0], tokens=np.concatenate([rows[0].tokens[:-3], rows[0].tokens[-6:]]), targets=rows[0].targets
    )
    second = replace(second, targets=np.concatenate([second.targets[:-3], second.targets[-6:]]))
    twice = replace(rows[4], targets=rows[4].targets.copy())
    twice.targets[3] = True
    many = [*rows, second, twice]
    prompts = prompts_of(rows)[:-1]
    events = []
    losses, answers = losses_and_answers(worker, many, prompts, GREEDY, events.append)
    assert worker.rows == 3
    assert losses == pytest.approx(worker.losses(many), rel=1e-4)
    assert len(answers) == len(prompts)
    last = {event["what"]: (event["done"], event["total"]) for event in events}
    assert last == {"losses": (3, 3), "answers": (len(prompts), len(prompts))}


def test_losses_alone(worker, rows):
    losses, answers = losses_and_answers(worker, rows, [], GREEDY, lambda event: None)
    assert losses == pytest.approx(worker.losses(rows), rel=1e-5)
    assert answers == []


def test_a_long_row_does_not_make_every_slot_longer(worker, rows):
    """It is read by itself."""
    short = Decoding(max_tokens=50)
    long = max(range(len(rows)), key=lambda i: len(rows[i].tokens))
    tokens = np.concatenate([rows[long].tokens, rows[long].tokens[-40:]])
    rows[long] = LossRow(rows[long].adapter, tokens, np.pad(rows[long].targets, (0, 40), constant_values=True))
    losses, answers = losses_and_answers(worker, rows, prompts_of(rows), short, lambda event: None)
    assert 0 < worker.rows < len(rows)
    assert losses == pytest.approx(worker.losses(rows), rel=1e-4)
    assert len(answers) == len(rows)
    assert max(answer.tokens for answer in answers) <= 50
