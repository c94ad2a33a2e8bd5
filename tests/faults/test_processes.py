"""Processes that hang, die at the worst moment, or whose clock is set: the final adapter is the unbroken run's."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest

from ftray.config import load_run
from ftray.session import ray_session
from ftray.train.launch import train
from tests.ray.runs import processes, steps_of, wait_for, workers, write_run
from tests.ray.test_survival import assert_as_unbroken, ftray

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module", autouse=True)
def _ray():
    with ray_session(cpus=4):
        yield


@pytest.fixture(scope="module")
def unbroken(folder):
    train(load_run(write_run(folder, "unbroken", train__steps=STEPS)), on_event=lambda _: None, stop=threading.Event())
    return folder / "unbroken"


def at_step(folder: Path, step: int, act) -> threading.Thread:
    def watch() -> None:
        wait_for(lambda: any(event["step"] >= step for event in steps_of(folder)), 600)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def trained(run, *faults):
    """Train in this process; the summary and all that was told."""
    events = []
    summary = train(run, on_event=events.append, stop=threading.Event())
    for fault in faults:
        fault.join(timeout=10)
        assert not fault.is_alive(), "the fault never came"
    return summary, [event["text"] for event in events if event["kind"] in ("status", "warning")]


def test_a_stopped_worker_is_found_named_and_ended(folder, unbroken):
    """SIGSTOP: no connection breaks, nothing is raised, everybody waits."""
    file = write_run(folder, "hung", train__steps=STEPS)
    run = load_run(file, ["workers.stall_seconds=20"])
    stopped: list[int] = []

    def stop_one() -> None:
        worker = workers()[-1]
        worker.suspend()
        stopped.append(worker.pid)

    summary, told = trained(run, at_step(folder / "hung", 15, stop_one))
    assert summary["resumed_from"]
    # that one, once; on a machine that is slow enough others seem to hang too
    found = [text for text in told if f"(pid {stopped[0]} on " in text]
    assert len(found) == 1, told
    assert "has given no sign of life for" in found[0]
    assert "it is ended, and the workers start again" in found[0]
    assert_as_unbroken(folder / "hung", unbroken)


def test_the_controller_is_killed(folder, unbroken):
    def kill_controller() -> None:
        processes("ray::TrainContr")[0].kill()

    run = load_run(write_run(folder, "controller", train__steps=STEPS))
    summary, told = trained(run, at_step(folder / "controller", 15, kill_controller))
    assert summary["resumed_from"]
    assert any("starting the workers again from the last commit" in text for text in told)
    assert_as_unbroken(folder / "controller", unbroken)


def _dies_before_its_commit_counts(config):
    from ftray.train import commits, launch

    sealed, seen = commits.seal, Path(config["run"]["output"]) / "died"

    def die_once(where, facts, *more):
        if facts["step"] >= 14 and not seen.exists():
            seen.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return sealed(where, facts, *more)

    commits.seal = die_once
    launch._worker_main(config)


def _steps_its_clock(config):
    import time

    from ftray.train import launch, loop

    stepped, real = loop._Worker.step, time.time

    def step(worker, rows):
        if worker.progress.step == 20:
            time.time = lambda: real() - 3600.0
        return stepped(worker, rows)

    loop._Worker.step = step
    launch._worker_main(config)


@pytest.fixture
def in_workers(monkeypatch):
    """Puts a function between Ray Train and a worker's own, in the worker's process."""
    from ray import cloudpickle

    from ftray.train import launch

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield lambda function: monkeypatch.setattr(launch, "_worker_main", function)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_worker_dies_between_the_files_of_a_commit_and_its_manifest(folder, unbroken, in_workers):
    in_workers(_dies_before_its_commit_counts)
    run = load_run(write_run(folder, "unsealed", train__steps=STEPS))
    summary, _ = trained(run)
    assert (folder / "unsealed/died").exists()
    assert summary["resumed_from"] == 7, "the commit before"
    assert_as_unbroken(folder / "unsealed", unbroken)


def test_the_clock_goes_back_an_hour(folder, unbroken, in_workers):
    in_workers(_steps_its_clock)
    run = load_run(write_run(folder, "clock", train__steps=STEPS))
    trained(run)
    times = [event["time"] for event in steps_of(folder / "clock")]
    back = [step for step, (a, b) in enumerate(itertools.pairwise(times), 1) if b - a < -3000]
    assert back == [20], "the clock was not set in mid-run"
    assert all(event["seconds"] > 0 for event in steps_of(folder / "clock"))
    assert_as_unbroken(folder / "clock", unbroken)


def test_sigterm_and_three_seconds_later_sigkill(folder, unbroken):
    """What Kubernetes and Slurm do, with little patience: whether the commit was done in time or not."""
    file, run = write_run(folder, "evicted", train__steps=STEPS, train__commit_every=10), folder / "evicted"
    driver = ftray("train", str(file))
    wait_for(lambda: len(steps_of(run)) >= 15, 600)
    below = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGTERM)
    try:
        driver.wait(3)
    except Exception:  # noqa: BLE001 - it did not make it, which is the case this is about
        for process in [*below, psutil.Process(driver.pid)]:
            if process.is_running():
                process.kill()
    driver.communicate()
    output, _ = (again := ftray("train", str(file))).communicate(timeout=900)
    assert again.returncode == 0, output
    resumed = [e for e in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if e["kind"] == "resume"]
    assert resumed
    assert resumed[0]["step"] >= 10
    assert_as_unbroken(run, unbroken)
