"""Who may be elastic, who is waited for, who hangs, and how often workers start again: decided without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from ftray.cli.check import batch_text
from ftray.config import Run, parse_run
from ftray.errors import ConfigError, RunError
from ftray.train import pulse, watch
from ftray.train.board import Board
from ftray.train.launch import _may_start_again
from ftray.train.places import SETTLE_SECONDS, enough, missing
from ftray.train.pulse import SILENT_SECONDS, Life, birth, end_process, hanging
from ftray.train.watch import Retries

RUN = """
name: a
model: {path: embedded}
method: {name: lora, rank: 4}
data: {sources: [{path: a.jsonl, format: prompt_completion}], max_length: 64}
train: {steps: 10, batch_rows: 12, micro_batch_rows: 3}
"""


def a_run(*overrides: str) -> Run:
    return parse_run(RUN, "a.yaml", list(overrides))


def test_workers_are_a_number_or_a_range():
    for run, least, most in (
        (a_run(), 1, 1),
        (a_run("workers.count=3"), 3, 3),
        (a_run("workers={min: 1, max: 4}"), 1, 4),
        (a_run("workers={gpus: 0}"), 1, 1),
    ):
        assert (run.workers.least, run.workers.most, run.workers.elastic) == (least, most, least != most)
        assert Run.model_validate(run.dump()) == run, "the resolved file says the same"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("workers={count: 2, min: 1, max: 4}",), "give one of both"),
        (("workers={min: 2}",), "workers.max is not given"),
        (("workers={min: 4, max: 2}",), "workers.min 4 is above workers.max 2"),
        (("workers={min: 1, max: 13}",), "lower workers.max"),
        (("workers={min: 1, max: 2}", "strategy={zero: 2}"), "ZeRO 2 divides states"),
    ],
)
def test_what_cannot_be_elastic_is_told_why(overrides, told):
    with pytest.raises(ConfigError, match=told):
        a_run(*overrides)


def test_check_shows_a_step_with_fewest_and_with_most_workers():
    text = batch_text(a_run("workers={min: 1, max: 4}"))
    assert "12 rows a step = 1 worker × 4 micro-batches of 3" in text
    assert "up to: 12 rows a step = 4 workers × 1 micro-batch of 3" in text


def test_workers_start_when_all_places_are_there_or_enough_for_a_while():
    assert enough(4, 1, 4, 0)
    assert not enough(2, 1, 4, SETTLE_SECONDS - 1), "the others may be about to come"
    assert enough(2, 1, 4, SETTLE_SECONDS)
    assert not enough(1, 2, 2, 1000)


def test_what_is_missing_is_said_in_resources():
    told = missing({"CPU": 2, "GPU": 1}, 4, 1, 600, "10.0.0.1 (lost)")
    assert "4 workers × 2 CPU and 1 GPU" in told
    assert "room for 1" in told
    assert "6 CPU and 3 GPU are missing" in told
    assert "10.0.0.1 (lost)" in told


def a_life(rank: int, marks: int, silent: float = 0.1, stuck: float = 0.1) -> Life:
    return Life(rank, f"node{rank}", f"10.0.0.{rank}", 100 + rank, 0.0, marks, "a micro-batch", silent, stuck)


def test_a_silent_worker_hangs_even_before_its_first_step():
    found = hanging([a_life(0, 0), a_life(1, 0, silent=SILENT_SECONDS)], 1800)
    assert found
    assert found[0].rank == 1
    assert "worker 1 (pid 101 on 10.0.0.1) has given no sign of life for 60 s" in found[1]


def test_of_workers_that_stand_still_the_one_behind_is_the_cause():
    found = hanging([a_life(0, 17, stuck=40), a_life(1, 15, stuck=41)], 30)
    assert found
    assert found[0].rank == 1
    assert "no progress for 41 s; it is at a micro-batch" in found[1]


def test_nobody_hangs_who_loads_a_base_or_waits_for_one_that_goes_on():
    assert hanging([], 30) is None
    assert hanging([a_life(0, 0, stuck=900), a_life(1, 0, stuck=900)], 30) is None
    assert hanging([a_life(0, 9, stuck=40), a_life(1, 8, stuck=2)], 30) is None


def test_retries_count_failures_without_a_commit_in_between():
    retries = Retries(2)
    assert [retries.another(newest) for newest in ([], [], [10], [10], [10])] == [True, True, True, True, False]
    assert not Retries(0).another([])
    always = Retries(-1)
    assert all(always.another([]) for _ in range(50))


def test_a_board_sends_those_home_whose_group_was_followed_by_another():
    board = Board()
    board.open(0)
    assert board.join(0, a_life(0, 0))
    assert board.beat(0, 0, 1, "a step") == "go on"
    board.leave()
    assert board.push(0, []), "the loop hears it with its next events"
    assert board.beat(0, 0, 2, "a step") == "stop"
    board.open(1)
    assert board.beat(0, 0, 3, "a step") == "end"
    assert not board.join(0, a_life(1, 0))
    assert not board.push(1, []), "the wish was for the group before"


def test_a_board_hears_nothing_of_a_group_that_was_followed_by_another():
    board = Board()
    board.open(0)
    board.join(0, a_life(0, 0))
    board.fail(0, RunError("of the group that is over"))
    board.open(1)
    board.push(0, [{"kind": "step"}])
    board.fail(0, RunError("late"))
    board.crash(0, "late")
    board.finish(0, {"reason": "finished"})
    assert board.outcome() == {"error": None, "summary": None, "crashes": []}
    assert board.failures() == 0
    assert board.drain(stop=False) == []
    board.push(1, [{"kind": "step"}])
    board.crash(1, "mine")
    board.finish(1, {"reason": "stopped"})
    assert board.outcome() == {"error": None, "summary": {"reason": "stopped"}, "crashes": ["mine"]}
    assert board.drain(stop=False) == [{"kind": "step"}]


def test_a_board_that_was_closed_sends_everybody_home_and_lets_their_silence_grow():
    board = Board()
    board.open(0)
    for rank in (0, 1):
        board.join(0, a_life(rank, 0))
    board.part(0, 1)
    assert [life.rank for life in board.close()] == [0, 1]
    time.sleep(0.1)
    assert board.beat(0, 0, 1, "a step") == "end"
    assert not board.join(0, a_life(2, 0))
    [life] = board.lives()
    assert life.silent >= 0.1, "a sign of life that was not wanted extends no lease"


def waited_out(writer: Life | None, left: list[Life], stop: bool = False) -> tuple[float, list[str]]:
    """(seconds until the next group may open, what was told), for a writer that says nothing more."""
    began, told, stopped = time.monotonic(), list[str](), threading.Event()
    if stop:
        stopped.set()

    def lives() -> list[Life]:
        now = time.monotonic() - began
        return [a_life(1, 5)] + ([replace(writer, silent=writer.silent + now)] if writer else [])

    watch.wait_out(lives, left, stopped, told.append)
    return time.monotonic() - began, told


def test_a_group_opens_once_a_writer_that_cannot_be_reached_has_ended_by_itself(monkeypatch):
    monkeypatch.setattr(watch, "SILENT_SECONDS", 0.4)
    monkeypatch.setattr(watch, "_PARTING_SECONDS", 0.1)
    writer = a_life(0, 5)
    seconds, told = waited_out(writer, [writer])
    assert seconds >= 0.4
    assert len(told) == 1
    assert "worker 0 (pid 100 on 10.0.0.0), which writes the commits, cannot be reached" in told[0]
    for writer_now, left, stop in (
        (writer, [a_life(1, 5)], False),  # it is known to be gone; the other writes nothing
        (None, [writer], False),  # its loop had ended
        (replace(writer, silent=0.6), [writer], False),  # Ray took longer to miss it than it had to live
        (writer, [writer], True),
    ):
        _, told = waited_out(writer_now, left, stop)
        assert told == [], "nobody is waited for"


def test_a_worker_that_hears_nothing_ends_in_time_however_it_is_told(monkeypatch):
    """A connection that breaks at once and a call that is never answered after it: one lease, not two."""
    import ray
    from ray.exceptions import GetTimeoutError, RaySystemError

    now, begun, ended, calls = 100.0, threading.Event(), threading.Event(), list[float]()
    monkeypatch.setattr(pulse, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(pulse, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(pulse, "time", SimpleNamespace(monotonic=lambda: now))

    def get(_: object, timeout: float) -> str:
        nonlocal now
        assert begun.wait(60)
        calls.append(timeout)
        if len(calls) == 1:
            now += 0.5
            raise RaySystemError("the connection broke")
        now += timeout
        raise GetTimeoutError

    def leave(_: int) -> None:
        ended.set()
        beating.end()

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(pulse.os, "_exit", leave)
    beating = pulse.Pulse(MagicMock(), 0, 0)
    begun.set()
    assert ended.wait(60)
    assert (calls, now) == ([1.0, 0.5], 101.0)


class StartupTimeout(Exception):
    """As Ray Train's, by its name."""


def test_places_that_look_free_and_never_are_end_the_run(tmp_path):
    run, failure = a_run(f"output={tmp_path}"), Exception()
    failure.controller_failure = StartupTimeout()  # type: ignore[attr-defined]
    retries, now = Retries(1), time.monotonic()
    assert all(_may_start_again(run, failure, retries, now + 600) for _ in range(5)), "they may come yet"
    assert [_may_start_again(run, failure, retries, now) for _ in range(3)] == [True, False, False]


def test_a_board_knows_who_stands_still_and_forgets_who_is_done():
    board = Board()
    board.open(0)
    for rank in (0, 1):
        board.join(0, a_life(rank, 0))
    board.beat(0, 1, 5, "a micro-batch")
    lives = {life.rank: life for life in board.lives()}
    assert (lives[1].marks, lives[1].doing) == (5, "a micro-batch")
    assert 0 <= lives[1].stuck <= lives[0].stuck
    board.part(0, 1)
    assert [life.rank for life in board.lives()] == [0]
    assert len(board.members()) == 2


def test_a_stopped_process_is_ended_and_another_with_its_pid_is_not():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    born = birth(child.pid)
    os.kill(child.pid, signal.SIGSTOP)
    assert end_process(child.pid, born - 60)
    assert child.poll() is None, "it began at another time, so it is not the one that was meant"
    assert end_process(child.pid, born)
    assert child.poll() is not None
