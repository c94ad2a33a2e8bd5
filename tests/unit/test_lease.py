"""Who leads a run, who writes it, and what is made of those whose machine or driver is gone. Without a cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
import pytest

from ftray.config import Run, parse_run
from ftray.errors import RunError, RunStopped
from ftray.manifest import join, read_text, write_text
from ftray.train import launch, lease
from ftray.train.doctor import examine, mend
from ftray.train.lease import DRIVER, LEASE, driving, holders, refuse_driver, wait_for_others
from tests.ray.runs import wait_for

RUN = """
name: a
model: {path: embedded}
method: {name: lora, rank: 4}
data: {sources: [{path: a.jsonl, format: prompt_completion}], max_length: 64}
train: {steps: 10}
"""


@contextmanager
def another_process(folder: Path, name: str, *, commanded: bool = False, seconds: float = 600) -> Iterator[int]:
    """The pid of a process that has a lease in the folder for some seconds."""
    code = f"""
import time
from ftray.train.lease import lease
with lease({str(folder)!r}, {name!r}, commanded={commanded}):
    print("ready", flush=True)
    time.sleep({seconds})
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def waited(
    folder: Path, stop: threading.Event | None = None, meanwhile: Callable[[], None] = lambda: None
) -> tuple[float, list[str]]:
    """(seconds until nobody is at work there, what was told); `meanwhile` happens once it waits."""
    began, told = time.monotonic(), list[str]()

    def tell(text: str) -> None:
        told.append(text)
        meanwhile()

    wait_for_others(str(folder), tell, stop or threading.Event())
    return time.monotonic() - began, told


def test_a_run_has_one_driver_at_a_time(tmp_path):
    with another_process(tmp_path, DRIVER, commanded=True) as pid:
        for refused in (lambda: waited(tmp_path), lambda: refuse_driver(str(tmp_path))):
            with pytest.raises(RunError, match=f"process {pid} of this machine") as raised:
                refused()
            assert "the same command goes on" in (raised.value.hint or "")
        psutil.Process(pid).kill()
        wait_for(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        refuse_driver(str(tmp_path))
        assert waited(tmp_path)[0] < 30, "what is dead leads nothing, though nobody has taken leave of it"


def test_workers_of_a_driver_that_is_gone_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_QUIET_SECONDS", 0.5)
    with another_process(tmp_path, LEASE, seconds=3) as pid:
        refuse_driver(str(tmp_path))
        seconds, told = waited(tmp_path)
    assert seconds > 1
    assert len(told) == 1
    assert f"process {pid} of this machine" in told[0]
    with another_process(tmp_path, DRIVER, seconds=2):  # an actor of Ray's, which leads a trial
        assert waited(tmp_path)[0] > 0.5


def test_workers_that_do_not_end_are_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_ORPHAN_SECONDS", 1.0)
    with (
        another_process(tmp_path, LEASE) as pid,
        pytest.raises(RunError, match=f"process {pid} of this machine .* still writes here"),
    ):
        waited(tmp_path)


def test_a_wish_to_stop_is_heard_while_it_waits(tmp_path):
    stop = threading.Event()
    stop.set()
    with another_process(tmp_path, LEASE), pytest.raises(RunStopped):
        waited(tmp_path, stop)


def a_lease_of_another_machine(folder: Path, name: str, ago: float, *, commanded: bool) -> Callable[[], None]:
    """A lease that was renewed so many seconds ago by its own clock; returns what renews it."""

    def renew() -> None:
        who = {"host": "another", "pid": 1, "born": 0.0, "commanded": commanded, "beat": time.time() - ago}
        write_text(join(str(folder), name), json.dumps(who))

    renew()
    return renew


@pytest.mark.parametrize("ago", [0.0, -600.0], ids=["clocks agree", "its clock goes ahead"])
def test_another_machines_driver_is_taken_for_dead_once_it_is_not_heard(tmp_path, monkeypatch, ago):
    monkeypatch.setattr(lease, "_FRESH_SECONDS", 1.5)
    monkeypatch.setattr(lease, "_QUIET_SECONDS", 0.2)
    a_lease_of_another_machine(tmp_path, DRIVER, ago, commanded=True)
    seconds, told = waited(tmp_path)
    assert 1 < seconds < 60
    assert "process 1 on another" in told[0]


def test_another_machines_driver_that_renews_its_lease_leads_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_QUIET_SECONDS", 0.0)
    renew = a_lease_of_another_machine(tmp_path, DRIVER, 30, commanded=True)
    refuse_driver(str(tmp_path))  # at once only what is known
    with pytest.raises(RunError, match=r"process 1 on another.* is at work in this folder now"):
        waited(tmp_path, meanwhile=renew)


def test_another_machines_worker_may_renew_its_lease_until_it_misses_its_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(lease, "_FRESH_SECONDS", 1.5)
    renew = a_lease_of_another_machine(tmp_path, LEASE, 0, commanded=False)
    seconds, told = waited(tmp_path, meanwhile=renew)
    assert seconds > 1
    assert len(told) == 1


def test_a_lease_outlives_a_clock_that_is_set(tmp_path, monkeypatch):
    """psutil reckons when a process began from when the machine started, which moves with the clock."""
    began = psutil.Process.create_time
    with another_process(tmp_path, LEASE):
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: began(self) - 3600)
        [holder] = holders(str(tmp_path))
        assert holder.alive


def test_what_this_process_left_by_mistake_holds_nobody_up(tmp_path):
    with lease.lease(str(tmp_path), DRIVER, commanded=True):
        assert [holder.alive for holder in holders(str(tmp_path))] == [True]
        with pytest.raises(RunError, match=f"process {os.getpid()}"):
            waited(tmp_path)
        left = read_text(join(str(tmp_path), DRIVER))
    assert holders(str(tmp_path)) == []
    write_text(join(str(tmp_path), DRIVER), left)  # a store that did not take it away
    assert waited(tmp_path)[0] < 30


def test_a_lease_stays_where_it_is_when_the_process_goes_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with lease.lease("run"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        time.sleep(0.5)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert list((tmp_path / "run").iterdir()) == []


def a_run(folder: Path) -> Run:
    return parse_run(RUN, "a.yaml", [f"output={folder}/{{name}}"])


def test_data_in_the_making_are_the_drivers(tmp_path, monkeypatch):
    """`ftray doctor --mend` beside a run that is preparing its rows."""
    seen = []

    def prepare(run: Run, _: object) -> str:
        write_text(join(run.folder, "data", "0123", "work", "000000.json"), "{}")
        write_text(join(run.folder, "data.json"), json.dumps({"uri": join(run.folder, "data", "before")}))
        seen.append(examine(run.folder).running)
        with pytest.raises(RunError, match="being written right now"):
            mend(examine(run.folder))
        with pytest.raises(RunError, match="is at work in this folder now"):
            refuse_driver(run.folder)
        raise RunStopped("enough")

    monkeypatch.setattr(launch, "ray_session", lambda **_: nullcontext())
    monkeypatch.setattr(launch, "in_the_users_process", lambda: True)
    for check in ("worker_resources", "_refuse_on_nodes", "check_cluster"):
        monkeypatch.setattr(launch, check, lambda *_: None)
    monkeypatch.setattr(launch, "prepare", prepare)
    with pytest.raises(RunStopped, match="enough"):
        launch.train(a_run(tmp_path), on_event=lambda _: None, stop=threading.Event())
    assert seen
    assert str(os.getpid()) in seen[0]
    assert holders(str(tmp_path / "a")) == []


def test_the_lease_of_a_driver_that_was_killed_is_litter(tmp_path):
    with another_process(tmp_path, DRIVER, commanded=True):
        pass
    write_text(tmp_path / "run.yaml", RUN + f"output: {tmp_path}\n")
    [finding] = examine(str(tmp_path)).findings
    assert "gone" in finding.what
    assert finding.where.endswith(DRIVER)
    assert not mend(examine(str(tmp_path))).findings
    with driving(str(tmp_path), print, threading.Event(), commanded=True):
        assert examine(str(tmp_path)).running
