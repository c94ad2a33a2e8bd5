"""Two hosts from network namespaces, once a session. FTRAY_TEST_HOSTS names a cluster of `cluster/local/hosts.py` that
is up already and stays; without it the tests make one of their own, and remove it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "local" / "hosts.py"
TRAIN_SECONDS = 900


def pytest_runtest_setup(item: pytest.Item) -> None:
    expression = item.config.getoption("-m") or ""

    def asked(marker: str) -> bool:
        named = item.get_closest_marker(marker) is not None and marker in expression
        return named and f"not {marker}" not in expression

    if not (asked("hosts") or asked("faults") or os.environ.get("FTRAY_LONG")):
        pytest.skip("two hosts with a Ray each: -m hosts or FTRAY_LONG=1 runs it")
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and iproute2")


@dataclass
class Hosts:
    """A cluster of `cluster/local/hosts.py`."""

    name: str
    addresses: dict[str, str]
    folder: Path

    @property
    def scratch(self) -> Path:
        """One path, and another folder on each host."""
        return self.folder / "scratch"

    def call(self, *arguments: str, seconds: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--name", self.name, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, **options)

    def start(self, host: str, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A command on a host, its output in pipes."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "--name", self.name, "exec", host, "--", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )

    def run(
        self, host: str, *command: str, seconds: float = TRAIN_SECONDS, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(host, *command, **environment)
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def ftray(self, host: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(host, sys.executable, "-m", "ftray.cli.main", *arguments, **environment)

    def processes(self, host: str) -> list[psutil.Process]:
        listed = subprocess.run(
            ["ip", "netns", "pids", f"{self.name}-{host}"], capture_output=True, text=True, check=True
        ).stdout.split()
        found = []
        for pid in listed:
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def named(self, host: str, part: str) -> list[psutil.Process]:
        """Processes on a host whose command line contains `part`."""
        found = []
        for process in self.processes(host):
            with suppress(psutil.Error):  # it has ended by now
                if part in " ".join(process.cmdline()):
                    found.append(process)
        return found


def events(text: str) -> list[dict[str, Any]]:
    """What `--json` printed."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """A head and a worker with two CPUs each, and a client."""
    kept = os.environ.get("FTRAY_TEST_HOSTS")
    name = kept or f"t{os.getpid() % 10**7}"
    script = [sys.executable, str(SCRIPT), "--name", name]
    if not kept:
        up = [*script, "up", "--hosts", "2", "--cpus", "2", "--wait", "900"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(up, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    try:
        told = json.loads(subprocess.run([*script, "status", "--json"], capture_output=True, check=True).stdout)
        yield Hosts(name, {row["host"]: row["address"] for row in told["hosts"]}, Path(told["folder"]))
    finally:
        if not kept:
            subprocess.run([*script, "down"], check=True)
