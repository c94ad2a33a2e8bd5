"""A search whose trials are lanes of a base on each of two hosts."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.hosts.conftest import ROOT, Hosts, events

pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.timeout(2400)]


def write_search(folder: Path) -> Path:
    search: dict[str, Any] = {
        "name": "two",
        "run": "quickstart-cheese",
        "overrides": {
            "data": {"sources.0.limit": 100, "held_out.0.limit": 16, "max_length": 128},
            "train": {"steps": 12, "evaluate_every": 6, "batch_rows": 4, "micro_batch_rows": 4, "optimizer": "adamw"},
            "workers": {"count": 1, "gpus": 0},
            "logging": {"tensorboard": False},
        },
        "space": {"train.learning_rate": {"choice": [1e-3, 3e-3]}, "method.rank": {"choice": [2, 4]}},
        "sampler": "grid",
        "lanes": "auto",
        "output": str(folder / "two"),
    }
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(search))
    return file


def test_lanes_run_on_both_hosts(hosts: Hosts, tmp_path: Path) -> None:
    seconds: dict[str, float] = {}
    """CPU time of the process with the base, by host."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            for host in ("head", "worker1"):
                for process in hosts.named(host, "ray::Host"):
                    try:
                        seconds[host] = max(seconds.get(host, 0.0), process.cpu_times().user)
                    except psutil.Error:
                        continue

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        ran = hosts.ftray("head", "tune", str(write_search(tmp_path)), "--json")
    finally:
        done.set()
        watching.join()
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-2000:]
    outcome = json.loads((tmp_path / "two" / "outcome.json").read_text())
    assert outcome["finished"] == 4
    assert [e for e in events(ran.stdout) if e["kind"] == "trial_finished"]
    trials = sorted((tmp_path / "two" / "trials").iterdir())
    assert len(trials) == 4
    assert all((trial / "artefact" / "adapter_model.safetensors").exists() for trial in trials)
    assert set(seconds) == {"head", "worker1"}
    assert min(seconds.values()) > 0.2 * max(seconds.values()), seconds  # a base that never trained takes less


def test_a_search_in_a_folder_of_one_host_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    file = write_search(tmp_path)
    ran = hosts.run(
        "head",
        *(sys.executable, "-m", "ftray.cli.main", "tune", str(file)),
        f"output={hosts.scratch}/tmp/search",
        PYTHONPATH=os.fspath(ROOT),
    )
    assert ran.returncode == 3, ran.stderr[-3000:]
    assert "worker1 does not see this folder as it is here" in ran.stderr
