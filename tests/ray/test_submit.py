"""Jobs on a real Ray head of their own: dashboard, job server, token authentication. Many minutes on a busy machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from ftray.errors import EXIT_OK, EXIT_RUN, EXIT_STOPPED, EXIT_USER
from tests.ray.runs import steps_of, wait_for, write_run

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]
PACKAGE = Path(__file__).parents[2]
TOKEN = "a-token-of-this-test-alone-0123456789abcdef"


def free_ports(count: int) -> list[int]:
    opened = [socket.socket() for _ in range(count)]
    for one in opened:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


class Head:
    """A Ray head in a session of its own, ended by its own process ids."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, folder / "token"
        self.token.write_text(TOKEN)
        gcs, self.dashboard, agent, client, metrics = free_ports(5)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        command += [f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0"]
        command += [f"--temp-dir={folder}/r", "--num-cpus=2", "--object-store-memory=100000000"]
        environment = self.environment() | {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600", "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("PYTHONPATH", None)  # the job brings ftray itself
        self.log = folder / "head.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_API_SERVER_ADDRESS": self.address}
        return inherited | own | {"PYTHONPATH": str(PACKAGE), "HOME": str(self.folder)}

    def is_ready(self) -> bool:
        """Its node is alive. Raises AssertionError once Ray has ended."""
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        request = urllib.request.Request(
            f"{self.address}/nodes?view=summary", headers={"Authorization": f"Bearer {TOKEN}"}
        )
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
                nodes = json.load(answer)["data"]["summary"]
        except (OSError, ValueError, KeyError):
            return False
        return any(node.get("raylet", {}).get("state") == "ALIVE" for node in nodes)

    def end(self) -> None:
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="fs", dir="/tmp") as folder:  # sockets' paths are short
        for attempt in range(4):  # Ray gives a raylet 30 s to start, whatever the machine does meanwhile
            own = Path(folder) / f"h{attempt}"
            own.mkdir()
            started = Head(own)
            try:
                wait_for(started.is_ready, 700, every=0.5)
                time.sleep(3)  # a helper that did not see the node in its 30 s ends all of Ray a moment later
                assert started.is_ready()
                break
            except AssertionError:
                started.end()
                if attempt == 3:
                    raise
        try:
            yield started
        finally:
            started.end()


def ftray(head: Head, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ftray.cli.main", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=folder, env=head.environment() | environment, **pipes)  # type: ignore[call-overload]


def done(process: subprocess.Popen[str], seconds: float = 900) -> tuple[int, str]:
    text, _ = process.communicate(timeout=seconds)
    return process.returncode, text


def a_run(folder: Path, name: str, steps: int) -> Path:
    """A run file whose data are beside it, by relative paths."""
    path = write_run(folder, name, train__steps=steps, workers__count=1)
    run = yaml.safe_load(path.read_text())
    run["data"]["sources"][0]["path"], run["data"]["held_out"][0]["path"] = "train.jsonl", "held_out.jsonl"
    del run["data"]["cache"]
    path.write_text(yaml.safe_dump(run))
    return path


SUBMIT = ("submit", "--with-ftray", "--upload-data", "--")


def test_a_run_is_submitted_shown_and_finished(head: Head, tmp_path: Path) -> None:
    a_run(tmp_path, "short", steps=6)
    code, text = done(ftray(head, tmp_path, *SUBMIT, "train", "short.yaml"))
    assert code == EXIT_OK, text
    lines = text.splitlines()
    assert any(line.startswith("submitted as short-") for line in lines)
    assert any(line.startswith("training: 6 steps") for line in lines), "the log is shown"
    assert "held-out loss" in text
    assert not [line for line in lines if "job_manager" in line or "worker.py" in line], "ours alone"
    assert (tmp_path / "short/artefact/ftray.json").is_file()
    code, text = done(ftray(head, tmp_path, "runs", "list", "--json"))
    (found,) = [run for run in json.loads(text) if run["name"] == "short"]
    assert (code, found["state"], found["step"], found["of"]) == (0, "finished", 6, 6)


def test_a_stopped_run_commits_is_no_success_and_goes_on(head: Head, tmp_path: Path) -> None:
    a_run(tmp_path, "long", steps=400)
    first = ftray(head, tmp_path, *SUBMIT, "train", "long.yaml", "train.commit_every=1000")
    wait_for(lambda: len(steps_of(tmp_path / "long")) >= 5, 900)
    code, text = done(ftray(head, tmp_path, *SUBMIT, "train", "long.yaml"))
    assert code == EXIT_USER
    assert "is at work in this folder already" in text
    code, text = done(ftray(head, tmp_path, "runs", "stop", "long"))
    assert code == EXIT_OK
    assert "which is committed" in text
    code, text = done(first)
    assert code == EXIT_STOPPED, text
    stopped = len(steps_of(tmp_path / "long"))
    assert 5 <= stopped < 400
    code, text = done(
        ftray(head, tmp_path, *SUBMIT, "train", "long.yaml", "train.steps=400", "train.commit_every=1000")
    )
    assert code == EXIT_OK, text
    assert f"going on after step {stopped}" in text
    assert [event["step"] for event in steps_of(tmp_path / "long")] == list(range(1, 401))


def test_leaving_lets_the_job_go_on(head: Head, tmp_path: Path) -> None:
    a_run(tmp_path, "left", steps=400)
    watching = ftray(head, tmp_path, *SUBMIT, "train", "left.yaml")
    wait_for(lambda: len(steps_of(tmp_path / "left")) >= 3, 900)
    watching.send_signal(signal.SIGINT)
    code, text = done(watching, 60)
    assert code == 130
    assert "goes on" in text
    seen = len(steps_of(tmp_path / "left"))
    wait_for(lambda: len(steps_of(tmp_path / "left")) > seen, 300)
    again = ftray(head, tmp_path, "runs", "logs", "-f", "left")
    code, text = done(ftray(head, tmp_path, "runs", "stop", "left"))
    assert code == EXIT_OK
    code, text = done(again)
    assert code == EXIT_STOPPED
    assert "training: 400 steps" in text, "the log comes from its beginning"


def test_what_goes_wrong_on_the_cluster_has_its_own_exit_code(head: Head, tmp_path: Path) -> None:
    a_run(tmp_path, "bad", steps=6)
    code, text = done(
        ftray(head, tmp_path, *SUBMIT, "train", "bad.yaml", "data.sources.0.path=/not/on/the/cluster.jsonl")
    )
    assert code == EXIT_USER, text
    assert "/not/on/the/cluster.jsonl: taken as a path of the cluster" in text
    many = ["workers.count=64", "train.batch_rows=64", "train.micro_batch_rows=1", "workers.wait_seconds=5"]
    code, text = done(ftray(head, tmp_path, *SUBMIT, "train", "bad.yaml", *many))
    assert code == EXIT_RUN, text
    assert "64 workers" in text
    code, text = done(ftray(head, tmp_path, "submit", "--upload-data", "--", "train", "bad.yaml", PATH="/usr/bin:/bin"))
    assert code in (EXIT_OK, 127), text  # 127 where the head's own image has no ftray


def test_tokens(head: Head, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token-0123456789abcdef012345\n")
    code, text = done(ftray(head, tmp_path, "runs", "list", "--token-file", str(wrong)))
    assert code == EXIT_USER
    assert "refused the token" in text
    code, text = done(ftray(head, tmp_path, "runs", "list", RAY_AUTH_MODE="disabled"))
    assert code == EXIT_USER
    assert "asks for a token" in text
    code, text = done(ftray(head, tmp_path, "runs", "list", "--token-file", str(head.token)))
    assert code == EXIT_OK, text


def test_plain_ray_job_submit(head: Head, tmp_path: Path) -> None:
    """A variable that stands in the job's runtime environment and is passed on to workers is no conflict; what is
    killed after Ray's 3 s goes on from its last commit."""
    a_run(tmp_path, "plain", steps=400)
    environment = json.dumps({"env_vars": {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(PACKAGE)}})
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--runtime-env-json"]
    submit += [environment, "--submission-id"]
    command = [sys.executable, "-m", "ftray.cli.main", "train", "plain.yaml", "train.commit_every=5"]

    def run(job: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(
            [*submit, job, "--", *command],
            cwd=tmp_path,
            env=head.environment(),
            **pipes,  # type: ignore[call-overload]
        )

    first = run("plain-1")
    wait_for(lambda: len(steps_of(tmp_path / "plain")) >= 12, 900)
    code, text = done(ftray(head, tmp_path, "runs", "stop", "plain-1"))
    assert code == EXIT_OK, text
    done(first)
    assert len(steps_of(tmp_path / "plain")) < 400
    code, text = done(ftray(head, tmp_path, "runs", "show", "plain-1"))
    assert "stopped" in text
    second = run("plain-2")
    code, text = done(second)
    assert code == EXIT_OK, text
    assert "going on after step" in text
    assert [event["step"] for event in steps_of(tmp_path / "plain")] == list(range(1, 401))


def test_a_dashboard_that_is_away_for_a_while(head: Head, tmp_path: Path) -> None:
    """The process that answers is stopped for some seconds: the log goes on, whole."""
    a_run(tmp_path, "cut", steps=60)
    watching = ftray(head, tmp_path, *SUBMIT, "train", "cut.yaml", "logging.every=1")
    wait_for(lambda: len(steps_of(tmp_path / "cut")) >= 3, 900)
    answering = [
        p for p in psutil.Process(head.process.pid).children(recursive=True) if "dashboard.py" in " ".join(p.cmdline())
    ]
    assert answering
    for process in answering:
        process.suspend()
    time.sleep(5)
    for process in answering:
        process.resume()
    code, text = done(watching)
    assert code == EXIT_OK, text
    told = [line.split("/")[0] for line in text.splitlines() if line.startswith("step ")]
    assert told == [f"step {i}" for i in range(1, 61)]
