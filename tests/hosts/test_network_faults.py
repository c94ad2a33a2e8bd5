"""A host that is cut off the network: for half a minute, and for good."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray.runs import steps_of, wait_for, write_run

parts = pytest.importorskip("tests.hosts.conftest", reason="the hosts are not there")
pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.faults, pytest.mark.timeout(3600)]
STEPS = 150
ELASTIC = {"min": 1, "max": 2, "gpus": 0, "cpus": 2, "wait_seconds": 240}
"""One worker on each host."""


def start(hosts, file: Path) -> subprocess.Popen:
    return hosts.start("head", sys.executable, "-m", "ftray.cli.main", "train", str(file))


def a_run(folder: Path, name: str, workers) -> Path:
    slow = {"train__micro_batch_rows": 1, "train__commit_every": 10, "train__steps": STEPS}
    return write_run(folder, name, workers=workers, **slow)


def assert_as(run: Path, alone: Path) -> None:
    assert [event["cursor"] for event in steps_of(run)] == [[8 * i, 8 * i + 8] for i in range(STEPS)]
    mine, theirs = ([event["loss"] for event in steps_of(folder)] for folder in (run, alone))
    assert mine == pytest.approx(theirs, rel=1e-3)


@pytest.fixture(scope="module")
def alone(hosts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    done = hosts.ftray("head", "train", str(a_run(folder, "alone", ELASTIC | {"max": 1})))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "alone"


@pytest.mark.parametrize("seconds", [30, None], ids=["30 s", "for good"])
def test_a_host_is_cut_off(hosts, alone, seconds):
    """The run waits, or goes on without the host; when it is back it has no say in what happened meanwhile."""
    name = "briefly" if seconds else "forever"
    run = alone.parent / name
    driver = start(hosts, a_run(alone.parent, name, ELASTIC))
    try:
        wait_for(lambda: len(steps_of(run)) >= 15, 900)
        hosts.call("cut", "worker1")
        cut = time.monotonic()
        if seconds:
            time.sleep(seconds)
            hosts.call("heal", "worker1")
        before = len(steps_of(run))
        wait_for(lambda: len(steps_of(run)) > before + 5, 600)
        print(f"going on {time.monotonic() - cut:.0f} s after the cut")
        output, _ = driver.communicate(timeout=1800)
        assert driver.returncode == 0, output
        assert_as(run, alone)
    finally:
        driver.kill()
        hosts.call("heal", "worker1")
        if not seconds:  # its raylet gave up: a new one for those who come after
            hosts.call("kill", "worker1")
            hosts.call("start", "worker1", seconds=600)
