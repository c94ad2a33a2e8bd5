"""Runs of several users on one base: artefacts as of separate runs, whatever dies meanwhile."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from ftray.cli.main import call
from ftray.config import Run, load_run
from ftray.data.prepare import prepare
from ftray.data.prepared import PreparedData
from ftray.errors import ConfigError, DataError
from ftray.train.loop import train_worker
from ftray.train.world import World
from ftray.tune.together import train_together
from tests.ray.runs import steps_of, wait_for, write_rows, write_run
from tests.toys import Recorder
from tests.train.test_lanes import close, same_artefact

USERS = {
    "ada": {"method__rank": 8, "seed": 1, "train__steps": 30},
    "ben": {"method": {"name": "dora", "rank": 4}, "seed": 2, "train__batch_rows": 4, "train__steps": 24},
    "eve": {"method__rank": 2, "train__learning_rate": 5e-3, "train__batch_rows": 6, "train__steps": 36},
}
ONE = {"workers": {"count": 1, "cpus": 1, "gpus": 0}}


def runs_in(folder: Path, prefix: str = "") -> list[Run]:
    write_rows(folder / "of-eve.jsonl", 90, seed=9)
    sources = [{"path": str(folder / "of-eve.jsonl"), "format": "prompt_completion"}]
    own = {"eve": {"data__sources": sources}}
    return [
        load_run(write_run(folder, f"{prefix}{name}", **keys, **ONE, **own.get(name, {})))
        for name, keys in USERS.items()
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, local_ray) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def separate(folder) -> dict[str, list[float]]:
    """Losses of each user's run, trained by itself."""
    losses = {}
    for name, run in zip(USERS, runs_in(folder, "alone-"), strict=True):
        data = PreparedData.open(prepare(run, lambda _: None))
        train_worker(run, data, World(), channel := Recorder())
        losses[name] = channel.losses
    return losses


def test_artefacts_are_those_of_separate_runs(folder, separate):
    runs = runs_in(folder)
    code = call(["train", *(str(folder / f"{name}.yaml") for name in USERS)])
    assert code == 0
    for run in runs:
        close([event["loss"] for event in steps_of(Path(run.folder))], separate[run.name])
        same_artefact(Path(run.folder), folder / f"alone-{run.name}")
        assert (Path(run.folder) / "report.html").exists()
        assert (Path(run.folder) / "summary.json").exists()


def test_the_process_that_holds_the_base_is_killed(folder, separate):
    runs, killed = runs_in(folder, "killed-"), []

    def on_event(name, event):
        if event["kind"] == "step" and event["step"] == 16 and not killed:
            killed.extend(hosts())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    outcomes = train_together(runs, on_event=on_event, stop=threading.Event())
    assert len(killed) == 1
    for name, run in zip(USERS, runs, strict=True):
        assert isinstance(outcomes[run.name], dict), outcomes[run.name]
        steps = steps_of(Path(run.folder))
        assert [event["step"] for event in steps] == list(range(1, run.train.steps + 1))
        close([event["loss"] for event in steps], separate[name])
        same_artefact(Path(run.folder), folder / f"alone-{name}")
    wait_for(lambda: not hosts(), 30)


def hosts() -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::Host"):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_stop_commits_every_run_and_the_same_command_goes_on(folder, separate):
    runs, stop = runs_in(folder, "stopped-"), threading.Event()

    def on_event(name, event):
        if event["kind"] == "step" and event["step"] >= 3 and not stop.is_set():
            stop.set()
            [host] = map(psutil.Process, hosts())
            host.suspend()  # so that it is not at its end when it hears of it
            threading.Timer(1, host.resume).start()

    outcomes = train_together(runs, on_event=on_event, stop=stop)
    assert {outcome["reason"] for outcome in outcomes.values()} == {"stopped"}  # type: ignore[index]
    outcomes = train_together(runs, on_event=lambda *_: None, stop=threading.Event())
    for name, run in zip(USERS, runs, strict=True):
        assert outcomes[run.name]["reason"] == "finished"  # type: ignore[index]
        close([event["loss"] for event in steps_of(Path(run.folder))], separate[name])


def test_a_run_that_cannot_begin_leaves_the_others_alone(folder, separate):
    """Commits of another run are in its folder."""
    runs_in(folder, "odd-")
    again = load_run(folder / "alone-ada.yaml", ["train.learning_rate=1e-4"])
    fresh = load_run(folder / "odd-ben.yaml", ["name=odd-new", f"output={folder}/odd-new", "train.steps=2"])
    outcomes = train_together([again, fresh], on_event=lambda *_: None, stop=threading.Event())
    assert "commits of a run with other settings" in str(outcomes["alone-ada"])
    assert outcomes["odd-new"]["reason"] == "finished"  # type: ignore[index]


def test_what_cannot_share_a_base_is_refused_before_ray_starts(folder, capsys):
    runs_in(folder, "plain-")
    files = [str(folder / "plain-ada.yaml"), str(folder / "plain-ben.yaml")]
    assert call(["train", *files, "train.optimizer=lion"]) == 2
    assert "cannot share a base" in capsys.readouterr().err
    assert call(["train", files[0], files[0]]) == 2
    assert "two runs have the name" in capsys.readouterr().err


def test_gpus_that_are_not_there_are_refused(folder):
    first, second, _ = runs_in(folder, "greedy-")
    second = load_run(folder / "greedy-ben.yaml", ["workers.gpus=64"])
    with pytest.raises(ConfigError, match=r"1 worker × 64 GPU = 64, the cluster has"):
        train_together([first, second], on_event=lambda *_: None, stop=threading.Event())


def test_rows_that_cannot_be_read_stop_before_anything_is_trained(folder):
    first, second, _ = runs_in(folder, "bad-")
    second = load_run(folder / "bad-ben.yaml", ["data.sources.0.path=nowhere.jsonl"])
    with pytest.raises(DataError):
        train_together([first, second], on_event=lambda *_: None, stop=threading.Event())
