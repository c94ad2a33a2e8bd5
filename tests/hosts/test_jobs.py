"""`ray job submit` from a machine of the network that runs no Ray."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.hosts.conftest import ROOT, Hosts

pytestmark = [pytest.mark.hosts, pytest.mark.root, pytest.mark.timeout(1800)]
RAY = Path(sys.executable).parent / "ray"


def submit(hosts: Hosts, *command: str, own: tuple[str, ...] = ()):
    """`ray job submit` from the client; `own` are arguments of `env` for the submitting program alone."""
    line = ["env", *own, str(RAY), "job", "submit", "--address", f"http://{hosts.addresses['head']}:8265"]
    return hosts.run("client", *line, "--", *command)


def test_a_job_from_elsewhere_trains_with_the_token(hosts: Hosts, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "ftray.cli.main", "train", "quickstart-cheese", f"output={tmp_path}/{{name}}"),
        *(f"data.cache={tmp_path}/prepared", "data.sources.0.limit=100", "data.held_out.0.limit=8", "train.steps=3"),
        *("train.evaluate_every=null", "train.batch_rows=4", "train.micro_batch_rows=4", "train.optimizer=adamw"),
        *("workers.count=2", "workers.gpus=0", "workers.cpus=2", "logging.tensorboard=false", "--json"),
    ]
    done = submit(hosts, "env", f"PYTHONPATH={ROOT}", *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2 workers on 2 nodes, over gloo" in done.stdout
    assert json.loads((tmp_path / "quickstart-cheese" / "summary.json").read_text())["steps"] == 3


def test_a_job_without_the_token_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    mark, wrong = tmp_path / "mark", tmp_path / "token"
    wrong.write_text("0" * 64)
    bare = ["-u", "RAY_AUTH_MODE", "-u", "RAY_AUTH_TOKEN_PATH", f"HOME={tmp_path}"]  # where no token lies either
    for own in (bare, [f"RAY_AUTH_TOKEN_PATH={wrong}"]):
        done = submit(hosts, "touch", str(mark), own=tuple(own))
        assert done.returncode != 0
        assert "token" in (done.stdout + done.stderr).lower(), done.stderr[-2000:]
    assert not mark.exists()


def test_the_dashboard_asks_for_the_token(hosts: Hosts) -> None:
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, build_opener

    straight = build_opener(ProxyHandler({}))  # no proxy of this machine's leads to the hosts
    with pytest.raises(HTTPError) as error:
        straight.open(f"http://{hosts.addresses['head']}:8265/api/jobs/", timeout=60)
    assert error.value.code in (401, 403)
    assert os.stat(hosts.folder / "token").st_mode & 0o077 == 0
