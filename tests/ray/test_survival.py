"""Any process can be killed at any time: the final adapter is the unbroken run's, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from ftray.config import load_run
from ftray.errors import EXIT_STOPPED
from ftray.train.launch import train
from tests.ray.runs import kill_a_worker_at, steps_of, tensors, wait_for, workers, write_run

pytestmark = pytest.mark.faults
STEPS = 100
"""Enough that a kill falls before the end."""
SEED = int(os.environ.get("FTRAY_TEST_SEED", random.SystemRandom().randrange(1000)))
"""Where the kills fall; printed, so that a failure can be had again."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_ray) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def unbroken(folder):
    print(f"FTRAY_TEST_SEED={SEED}")
    train(load_run(write_run(folder, "unbroken", train__steps=STEPS)), on_event=lambda _: None, stop=threading.Event())
    return folder / "unbroken"


def assert_as_unbroken(run: Path, unbroken: Path) -> None:
    mine, theirs = tensors(run), tensors(unbroken)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    steps = steps_of(run)
    assert [event["cursor"] for event in steps] == [[8 * i, 8 * i + 8] for i in range(len(steps))]
    assert [event["loss"] for event in steps] == [event["loss"] for event in steps_of(unbroken)]


def test_a_worker_is_killed_and_killed_again(folder, unbroken):
    """Two kills in a row: at a random step, and right after the resumed group's first step."""
    run = load_run(write_run(folder, "worker-killed", train__steps=STEPS))
    first = random.Random(SEED).randrange(10, 40)
    killers = [kill_a_worker_at(folder / run.name, first)]

    def on_event(event):
        if event["kind"] == "resume" and len(killers) == 1:
            killers.append(kill_a_worker_at(folder / run.name, event["step"] + 1))

    events = []
    summary = train(run, on_event=lambda event: (events.append(event), on_event(event)), stop=threading.Event())
    assert len(killers) == 2
    assert summary["resumed_from"]
    assert sum(event["kind"] == "resume" for event in events) >= 2
    told = [event["text"] for event in events if event["kind"] == "warning"]
    assert any("a worker was lost" in text and "again" in text for text in told)
    assert "for the third time" in (folder / run.name / "metrics.jsonl").read_text(), "the report reads this"
    assert_as_unbroken(folder / run.name, unbroken)


def ftray(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ftray.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_driver_is_killed_then_told_to_stop(folder, unbroken):
    """SIGKILL leaves nothing running; SIGTERM to the next one commits and leaves with its own exit code; the third ends
    the run."""
    file = write_run(folder, "driver-killed", train__steps=STEPS)
    run, at = folder / "driver-killed", random.Random(SEED + 1).randrange(10, 40)
    driver = ftray("train", str(file))
    wait_for(lambda: len(steps_of(run)) >= at)
    ended = workers(driver.pid)
    assert ended
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(ended, timeout=60)[1]
    assert not (run / "artefact").exists()
    stopped_by(signal.SIGTERM, ftray("train", str(file)), run, after=len(steps_of(run)) + 5)
    ends(file)
    assert_as_unbroken(run, unbroken)


def stopped_by(sent: signal.Signals, driver: subprocess.Popen, run: Path, after: int) -> None:
    """Tell a run's driver to stop after so many steps: its last step is committed, whenever the next commit was due."""
    wait_for(lambda: len(steps_of(run)) >= after)
    driver.send_signal(sent)
    output, _ = driver.communicate(timeout=120)
    assert driver.returncode == EXIT_STOPPED, output
    assert "Traceback" not in output
    assert max(int(p.name.split("-")[1]) for p in (run / "commits").glob("step-*")) == len(steps_of(run)) >= after


def ends(file: Path) -> None:
    output, _ = (again := ftray("train", str(file))).communicate(timeout=400)
    assert again.returncode == 0, output


@pytest.mark.long
def test_ctrl_c_commits_and_leaves_with_its_own_exit_code(folder, unbroken):
    file = write_run(folder, "interrupted", train__steps=STEPS, train__commit_every=1000)
    stopped_by(signal.SIGINT, ftray("train", str(file)), folder / "interrupted", after=5)
    ends(file)
    assert_as_unbroken(folder / "interrupted", unbroken)
