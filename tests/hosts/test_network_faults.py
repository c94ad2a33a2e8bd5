"""A host that is cut off the network: for half a minute, for good, and until the run has gone on without it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ftray.errors import EXIT_STOPPED
from ftray.train.pulse import birth, lives
from tests.faults.raylets import Driver
from tests.ray.runs import events_of, steps_of, wait_for, write_run

parts = pytest.importorskip("tests.hosts.conftest", reason="the hosts are not there")
pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.faults, pytest.mark.timeout(3600)]
STEPS = 150
NO_END = 100_000
"""Steps of a run that is stopped once what is to be seen was seen."""
ELASTIC = {"min": 1, "max": 2, "gpus": 0, "cpus": 2, "wait_seconds": 240}
"""One worker on each host."""


def a_run(folder: Path, name: str, workers, steps: int = STEPS) -> Path:
    slow = {"train__micro_batch_rows": 1, "train__commit_every": 10, "train__steps": steps}
    return write_run(folder, name, workers=workers, **slow)


@contextmanager
def driven(hosts, file: Path) -> Iterator[Driver]:
    """`ftray train` on the head, its output read all the while, with a worker on each host and a commit."""
    command = [sys.executable, "-m", "ftray.cli.main", "train", str(file)]
    driver, run = Driver(hosts.start("head", *command)), file.with_suffix("")
    try:
        wait_for(lambda: len(steps_of(run)) >= 15 and list((run / "commits").glob("step-*/manifest.json")), 900)
        assert [len(hosts.named(host, "ray::RayTrainWo")) for host in ("head", "worker1")] == [1, 1], driver.said
        yield driver
    finally:
        driver.end()


def switch(hosts, what: str, seconds: float = 120) -> float:
    """Cut worker1 off, heal, kill or start it; when that was done."""
    done = hosts.call(what, "worker1", seconds=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.monotonic()


@pytest.fixture
def cut_off(hosts):
    """Afterwards worker1 is there again for those who come after: its raylet may have given up."""
    yield
    switch(hosts, "heal")
    switch(hosts, "kill")
    switch(hosts, "start", seconds=600)


def workers_of(run: Path) -> list[int]:
    """How many workers each group of the run had."""
    return [event["workers"] for event in events_of(run, "start")]


def assert_rows(run: Path, steps: int) -> None:
    assert [event["cursor"] for event in steps_of(run)] == [[8 * i, 8 * i + 8] for i in range(steps)]


def assert_as(run: Path, alone: Path) -> None:
    assert_rows(run, STEPS)
    mine, theirs = ([event["loss"] for event in steps_of(folder)] for folder in (run, alone))
    assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def alone(hosts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    done = hosts.ftray("head", "train", str(a_run(folder, "alone", ELASTIC | {"max": 1})))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "alone"


@pytest.mark.parametrize("seconds", [30, None], ids=["30 s", "for good"])
def test_a_host_is_cut_off(hosts, alone, cut_off, seconds):
    """The run waits, or goes on without the host."""
    file = a_run(alone.parent, "briefly" if seconds else "forever", ELASTIC)
    run = file.with_suffix("")
    with driven(hosts, file) as driver:
        cut = switch(hosts, "cut")
        if seconds:
            time.sleep(seconds)
            switch(hosts, "heal")
        before = len(steps_of(run))
        wait_for(lambda: len(steps_of(run)) > before + 5, 600, every=0.2)
        print(f"going on {time.monotonic() - cut:.0f} s after the cut")
        assert driver.wait(1800) == 0, driver.said
    assert workers_of(run)[0] == 2
    if not seconds:
        assert workers_of(run) == [2, 1]
    assert_as(run, alone)


def test_a_host_that_is_back_has_no_say_in_a_run_that_went_on_without_it(hosts, alone, cut_off):
    file = a_run(alone.parent, "until-it-went-on", ELASTIC, NO_END)
    run = file.with_suffix("")
    with driven(hosts, file) as driver:
        [old] = hosts.named("worker1", "ray::RayTrainWo")
        born = birth(old.pid)
        cut = switch(hosts, "cut")
        wait_for(lambda: workers_of(run) == [2, 1], 600, every=0.5)
        print(f"a group of its own {time.monotonic() - cut:.0f} s after the cut")
        time.sleep(max(0.0, cut + 90 - time.monotonic()))
        assert not lives(old.pid, born), "it ends by itself, cut off as it is"
        switch(hosts, "heal")
        before = len(steps_of(run))
        wait_for(lambda: len(steps_of(run)) > before + 50, 600, every=0.5)
        driver.process.send_signal(signal.SIGTERM)
        assert driver.wait(600) == EXIT_STOPPED, driver.said
    assert workers_of(run)[:2] == [2, 1]
    assert_rows(run, len(steps_of(run)))
