"""Which runs there are, of jobs and of folders. No Ray."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftray.cli.main import call
from ftray.cli.runs import runs_table
from ftray.jobs.cluster import Job
from ftray.jobs.listing import FOLDERS, NAME, RunState, find, folders_in, from_events, is_ours, merged, of_job
from ftray.train import lease
from tests.unit.job_runs import write

EVENTS: list[dict[str, Any]] = [
    {"kind": "start", "steps": 40, "step": 0},
    {"kind": "evaluation", "step": 0, "loss": 6.0},
    {"kind": "step", "step": 7, "loss": 2.5},
]


@pytest.mark.parametrize(
    ("more", "held", "state"),
    [
        ([], True, "running"),
        ([], False, "interrupted"),
        ([{"kind": "end", "reason": "finished"}], False, "finished"),
        ([{"kind": "end", "reason": "early stopping"}], False, "finished"),
        ([{"kind": "end", "reason": "stopped"}], False, "stopped"),
        ([{"kind": "end", "reason": "stopped"}], True, "running"),
        ([{"kind": "end", "reason": "stopped"}, {"kind": "start", "steps": 40}], False, "interrupted"),
    ],
)
def test_what_a_folder_says(more: list[dict[str, Any]], held: bool, state: str) -> None:
    found = from_events({"name": "a", "train": {"epochs": 1}}, "runs/a", [*EVENTS, *more], 10.0, held)
    assert (found.state, found.step, found.of, found.loss, found.held_out) == (state, 7, 40, 2.5, 6.0)


def a_lease(folder: Path, *, age: float) -> None:
    """Of a process of another machine."""
    told = {"host": "elsewhere", "pid": 1, "born": 1.0, "commanded": False, "beat": time.time() - age}
    (folder / lease.LEASE).write_text(json.dumps(told))


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert call(["runs", "list", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_who_holds_the_lease_is_at_work_however_old_the_metrics_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On an object store they move only when something is committed."""
    write(tmp_path / "a/run.yaml")
    metrics = tmp_path / "a/metrics.jsonl"
    metrics.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    assert listed(capsys, str(tmp_path))[0]["state"] == "interrupted", "moved a moment ago, by nobody who is there"
    hour_ago = time.time() - 3600
    os.utime(metrics, (hour_ago, hour_ago))
    for age, state in ((5, "running"), (3000, "interrupted")):
        a_lease(tmp_path / "a", age=age)
        (found,) = listed(capsys, str(tmp_path))
        assert (found["state"], found["step"]) == (state, 7)
        assert found["age_seconds"] > 3500


def test_a_search_is_at_work_while_its_lease_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = tmp_path / "s"
    search.mkdir()
    (search / "search.yaml").write_text("name: s\nsamples: 8\n")
    (search / "search.jsonl").write_text("{}\n")
    assert listed(capsys, str(tmp_path))[0]["state"] == "interrupted"
    a_lease(search, age=5)
    assert listed(capsys, str(tmp_path))[0]["state"] == "running"
    (search / "outcome.json").write_text("{}\n")
    assert listed(capsys, str(tmp_path))[0]["state"] == "finished"
    (search / "outcome.json").write_text("{")
    (found,) = listed(capsys, str(tmp_path))
    assert (found["name"], found["state"]) == ("s", "?")
    assert "JSONDecodeError" in found["unread"]


def test_runs_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "run.yaml", name=name)
    (tmp_path / "notes").mkdir()
    lines = [json.dumps(event) for event in [*EVENTS, {"kind": "end", "reason": "finished"}]]
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "st')
    assert folders_in(str(tmp_path)) == [f"{tmp_path}/a", f"{tmp_path}/b"]
    assert folders_in(str(tmp_path / "a")) == [str(tmp_path / "a")]
    assert call(["runs", "list", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["run", "state", "command", "step", "loss", "moved", "folder"]
    assert told[2].split()[:5] == ["a", "finished", "train", "7/40", "2.5000"]
    assert told[3].split()[1] == "interrupted"
    assert call(["runs", "list", "--json", str(tmp_path / "a")]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "finished"
    assert found["age_seconds"] < 600
    assert call(["runs", "show", str(tmp_path / "a")]) == 0
    assert "7/40" in capsys.readouterr().out
    assert call(["runs", "list", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def job(number: int, status: Any, folder: str = "s3://b/a", **more: Any) -> Job:
    metadata = {NAME: "a", FOLDERS: json.dumps([["a", folder]]), "ftray.command": "ftray train run.yaml"}
    return Job(f"a-{number}", status, started=1000.0 * number, metadata=metadata, **more)


def test_jobs_and_folders_are_told_once() -> None:
    folder = RunState("a", "interrupted", step=7, of=40, loss=2.5, folder="s3://b/a", changed=2500.0)
    running = merged([job(2, "RUNNING"), job(1, "STOPPED", ended=1500.0)], [folder])
    assert [(r.state, r.job, r.step, r.command) for r in running] == [("running", "a-2", 7, "train")]
    failed = merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [folder])
    assert failed[0].state == "failed"
    assert "failed (3)" in runs_table(failed, 5000.0)
    gone_on = RunState("a", "finished", step=40, of=40, folder="s3://b/a", changed=9000.0)
    assert merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [gone_on])[0].state == "finished"
    held = replace(folder, state="running")  # by somebody without a job; on an object store nothing has moved yet
    after = [merged([job(2, "FAILED", exit_code=3, ended=2600.0)], [held], now)[0].state for now in (2610.0, 3000.0)]
    assert after == ["failed", "running"]
    both = merged([job(1, "SUCCEEDED", ended=1500.0)], [RunState("z", "running", folder="z", changed=9000.0)])
    assert [r.name for r in both] == ["z", "a"]


def test_plain_jobs_and_those_of_others() -> None:
    plain = Job("raysubmit_1", "FAILED", "ftray train run.yaml", exit_code=75)
    assert is_ours(plain)
    assert [(s.name, s.state, s.command) for s in of_job(plain)] == [("raysubmit_1", "stopped", "train")]
    assert is_ours(Job("x", "RUNNING", "python -m ftray.cli.main tune s.yaml"))
    assert not is_ours(Job("x", "RUNNING", "python train.py --name ftrays"))


def test_a_job_is_found_by_what_it_fills() -> None:
    jobs = [job(2, "RUNNING"), job(1, "STOPPED")]
    for name in ("a", "a-2", "s3://b/a"):
        found = find(name, jobs)
        assert found is not None
        assert found.id == "a-2"
    assert find("a-1", jobs) == jobs[1]
    assert find("b", jobs) is None


class Known:
    """A cluster that knows these jobs."""

    def __init__(self, jobs: list[Job]) -> None:
        self.known = jobs

    def jobs(self) -> list[Job]:
        return self.known

    def job(self, job: str) -> Job:
        return next(found for found in self.known if found.id == job)

    def logs(self, job: str) -> str:
        return f"the log of {job}\n"

    def stop(self, job: str) -> bool:
        self.known = [replace(found, status="STOPPED", ended=1e9) for found in self.known if found.id == job]
        return True


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets `ftray runs` find these jobs."""

    def be(*jobs: Job) -> None:
        cluster = Known(list(jobs))
        monkeypatch.setattr("ftray.cli.runs.Cluster.open", lambda *_: cluster)
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")

    return be


def test_a_store_without_a_key_here_is_told_and_hides_nothing_else(
    known: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    write(tmp_path / "b/run.yaml", name="b")
    bucket = "s3://no-key-for-it"  # fsspec remembers the file systems of others
    known(job(3, "RUNNING", str(tmp_path / "b")), job(2, "RUNNING", f"{bucket}/a"), job(1, "FAILED", f"{bucket}/c"))
    assert call(["runs", "list"]) == 0
    told = capsys.readouterr().out.splitlines()
    rows = {line.split()[-1]: line.split() for line in told[2:5]}
    assert rows[f"{bucket}/a"][:4] == ["a", "running", "train", "?"]
    assert rows[str(tmp_path / "b")][1] == "running"
    assert told[-1].startswith(f"? {bucket}/a and 1 more there cannot be read from here: no credentials were found")
    assert call(["runs", "show", "a-2"]) == 0
    told = capsys.readouterr().out
    assert "no credentials were found" in told
    assert "a-2, RUNNING" in told
    assert call(["runs", "show", f"{bucket}/a"]) == 0
    assert "a-2, RUNNING" in capsys.readouterr().out
    assert call(["runs", "show", f"{bucket}/nobodys"]) == 3
    assert "no credentials were found" in capsys.readouterr().err
    assert call(["runs", "stop", "a-2"]) == 0
    assert "a-2 has ended" in capsys.readouterr().out


def test_a_run_is_known_by_its_file(
    known: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path
    monkeypatch.chdir(here)
    folder = str(here / "runs/a")
    write(here / "run.yaml", output=folder)
    write(here / "runs/a/run.yaml", output=folder)
    other = Job("b-1", "RUNNING", started=9e8, metadata=dict(job(9, "RUNNING", "s3://b/b").metadata))
    known(other, job(1, "STOPPED", folder, ended=1500.0))
    for given in ("run.yaml", folder, "a-1"):
        assert call(["runs", "show", "--json", given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["folder"], found["of_job"]["id"]) == (folder, "a-1")
        assert call(["runs", "logs", given]) == 0
        assert capsys.readouterr().out == "the log of a-1\n"
    write(here / "moved.yaml", output="s3://elsewhere/{name}")
    assert call(["runs", "logs", "moved.yaml"]) == 0
    assert capsys.readouterr().out == "the log of b-1\n", "the newest job of a run of this name"
    search = {"name": "s", "run": "run.yaml", "space": {"train.learning_rate": {"choice": [1e-3, 2e-3]}}}
    more = {"overrides": {"data.held_out_fraction": 0.5}, "output": "s3://b/b"}
    (here / "search.yaml").write_text(yaml.safe_dump(search | more))
    assert call(["runs", "logs", "search.yaml"]) == 0
    assert capsys.readouterr().out == "the log of b-1\n"
    (here / "notes.yaml").write_text("a: 1\n")
    assert call(["runs", "logs", "notes.yaml"]) == 2
