"""Nodes that die, are drained, and come back: real raylets on this machine, real workers, the real command."""

from __future__ import annotations

import time

import pytest
import torch

from ftray.errors import EXIT_RUN
from tests.faults.raylets import Raylets
from tests.ray.runs import events_of, standing_still, steps_of, tensors, wait_for, write_run

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]
SLOW = {"train__micro_batch_rows": 1, "train__batch_rows": 8, "train__commit_every": 10}


@pytest.fixture
def raylets(tmp_path):
    raylets = Raylets(tmp_path)
    try:
        yield raylets
    finally:
        raylets.close()


@pytest.fixture
def drivers():
    """Drivers to end when the drill is over."""
    started = []
    yield started
    for driver in started:
        driver.end()


def has_steps(folder, at_least):
    return len(steps_of(folder)) >= at_least


def has_a_commit(folder):
    return list((folder / "commits").glob("step-*/manifest.json"))


def assert_every_row_once(folder, steps):
    assert [event["cursor"] for event in steps_of(folder)] == [[8 * i, 8 * i + 8] for i in range(steps)]


def assert_close(folder, other):
    mine, theirs = ([event["loss"] for event in steps_of(f)] for f in (folder, other))
    assert len(mine) == len(theirs)
    assert max(abs(a - b) / b for a, b in zip(mine, theirs, strict=True)) < 1e-3


def test_a_lost_node_shrinks_the_run_and_a_new_one_lets_it_grow(tmp_path, raylets, drivers):
    """Rows and losses are those of one worker that nothing happened to."""
    steps, elastic = 150, {"min": 1, "max": 2, "gpus": 0, "cpus": 1, "wait_seconds": 120}
    second = raylets.add()
    drivers.append(raylets.start(write_run(tmp_path, "elastic", train__steps=steps, workers=elastic, **SLOW)))
    run, driver = tmp_path / "elastic", drivers[0]
    wait_for(lambda: has_steps(run, 15) and has_a_commit(run), 600)
    raylets.lose(second)
    lost = time.monotonic()
    wait_for(lambda: len(events_of(run, "start")) == 2, 300)
    print(f"shrunk to one worker {time.monotonic() - lost:.1f} s after the node was lost")
    assert [event["workers"] for event in events_of(run, "start")] == [2, 1]
    with standing_still() as left:  # or it might be at its end before the node is there
        assert len(left) == 1
        raylets.add()
        came = time.monotonic()
        wait_for(lambda: "there is room for 1 more: committing, to go on with 2" in driver.said, 50)
    before = len(steps_of(run))
    assert before < steps
    wait_for(lambda: len(events_of(run, "start")) == 3, 300)
    print(f"grown to two workers {time.monotonic() - came:.1f} s after a node came, {before} steps done before")
    assert driver.wait() == 0, driver.said
    assert [event["workers"] for event in events_of(run, "start")] == [2, 1, 2]
    assert_every_row_once(run, steps)
    drivers.append(raylets.start(write_run(tmp_path, "alone", train__steps=steps, **SLOW), "workers.count=1"))
    assert drivers[-1].wait() == 0, drivers[-1].said
    assert_close(run, tmp_path / "alone")


def test_without_a_spare_the_wait_is_bounded_and_with_one_the_weights_are_those_of_an_unbroken_run(
    tmp_path, raylets, drivers
):
    steps, fixed = 80, {"count": 2, "gpus": 0, "cpus": 1, "wait_seconds": 25}
    second = raylets.add()
    drivers.append(raylets.start(write_run(tmp_path, "unbroken", train__steps=steps, workers=fixed, **SLOW)))
    assert drivers[-1].wait() == 0, drivers[-1].said
    file, run = write_run(tmp_path, "broken", train__steps=steps, workers=fixed, **SLOW), tmp_path / "broken"
    drivers.append(raylets.start(file))
    wait_for(lambda: has_steps(run, 15), 600)
    raylets.lose(second)
    lost = time.monotonic()
    assert drivers[-1].wait(400) == EXIT_RUN, drivers[-1].said
    print(f"ended {time.monotonic() - lost:.1f} s after the node was lost, with workers.wait_seconds 25")
    assert "room for 1" in drivers[-1].said
    assert "1 CPU are missing" in drivers[-1].said
    assert "the same command goes on" in drivers[-1].said

    second = raylets.add()
    drivers.append(raylets.start(file))
    wait_for(lambda: has_steps(run, 35), 600)
    with standing_still():
        raylets.add()  # only now, so that a worker is on the one that is lost
        raylets.lose(second)
    assert drivers[-1].wait() == 0, drivers[-1].said
    assert "starting the workers again from the last commit" in drivers[-1].said
    assert_every_row_once(run, steps)
    mine, theirs = tensors(run), tensors(tmp_path / "unbroken")
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_drained_node_commits_just_in_time(tmp_path, raylets, drivers):
    """No step is trained twice: the run goes on from the step at which the node's workers left."""
    steps, elastic = 80, {"min": 1, "max": 2, "gpus": 0, "cpus": 1}
    second = raylets.add()
    options = SLOW | {"train__commit_every": 1000}
    drivers.append(raylets.start(write_run(tmp_path, "drained", train__steps=steps, workers=elastic, **options)))
    run, driver = tmp_path / "drained", drivers[0]
    wait_for(lambda: has_steps(run, 10), 600)
    with standing_still():
        raylets.drain(second, 60)
        drained = time.monotonic()
        wait_for(lambda: "is being drained within" in driver.said, 50)
    wait_for(lambda: has_a_commit(run), 120)
    print(f"committed {time.monotonic() - drained:.1f} s after the drain began")
    assert driver.wait() == 0, driver.said
    resumed = events_of(run, "resume")
    assert len(resumed) == 1
    assert resumed[0]["step"] >= 10
    assert [event["workers"] for event in events_of(run, "start")] == [2, 1]
    assert_every_row_once(run, steps)
    assert "was lost" not in driver.said
