"""Scripts of cluster/: they pass shellcheck, give Ray options that it knows, and end a Slurm job as it was told to."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.cluster import CLUSTER, TEXTS, tool

SLURM = sorted((CLUSTER / "slurm").iterdir())


def shellcheck(*given: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("shellcheck"), *given], input=text, capture_output=True, text=True, cwd=CLUSTER / "slurm"
    )


@pytest.mark.parametrize("file", [*SLURM, CLUSTER / "docker" / "g++"], ids=lambda f: f.name)
def test_scripts_pass_bash_and_shellcheck(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True)
    found = shellcheck("-x", str(file))
    assert found.returncode == 0, found.stdout


def test_a_wrong_script_is_refused() -> None:
    text = TEXTS[CLUSTER / "slurm" / "train.sbatch"]
    assert shellcheck("-", text=text.replace('"$code"', "$code").replace('cd "$SLURM', "cd $SLURM")).returncode != 0
    assert subprocess.run(["bash", "-n"], input=text + "\nif", text=True, capture_output=True).returncode != 0


def test_the_options_given_to_ray_are_known_to_it() -> None:
    """`ray symmetric-run` hands what it does not know to `ray start`, which runs on other machines, late."""
    scripts = importlib.util.find_spec("ray.scripts.scripts")
    assert scripts is not None
    assert scripts.origin is not None
    known = set(re.findall(r'"(--[a-z-]+)', Path(scripts.origin).read_text(encoding="utf-8")))
    text = TEXTS[CLUSTER / "slurm" / "symmetric.sh"]
    command = re.search(r"ray symmetric-run (.*?) -- ", text.replace("\\\n", " "), flags=re.S)
    assert command is not None
    options = set(re.findall(r"(--[a-z-]+)", command.group(1)))
    assert {"--address", "--min-nodes"} < options
    assert options - {"--address", "--min-nodes"} <= known
    assert not options & {"--head", "--node-ip-address", "--port", "--block"}
    drain = set(re.findall(r"ray drain-node ([^;]*);", "\n".join(TEXTS.values())))
    assert drain
    assert {option for each in drain for option in re.findall(r"(--[a-z-]+)", each)} <= known


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo here; else echo "$@" >> "$LOG"; fi',
    "hostname": "echo 127.0.0.1 192.0.2.7",
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"',
    "serve": "exit 0",
    "ftray": """
trap 'echo committed >> "$LOG"; exit 75' TERM
echo "$@ address=$RAY_ADDRESS mode=$RAY_AUTH_MODE" >> "$LOG"
if [ "$1" = serve ]; then exit 0; fi
if [ "$2" = broken ]; then exit 3; fi
while :; do sleep 0.1; done
""",
}
"""What a machine with Slurm has, as far as the scripts look at it."""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    for name, text in FAKES.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "LOG": str(tmp_path / "log"),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "FTRAY_SLURM": str(CLUSTER / "slurm"),
    }


@pytest.mark.parametrize(
    ("script", "sent", "code", "again"),
    [
        ("train", signal.SIGUSR1, 0, True),
        ("train", signal.SIGUSR2, 75, False),
        ("tune", signal.SIGUSR1, 0, True),
        ("serve", signal.SIGUSR2, 75, False),
    ],
)
def test_a_job_that_is_told_to_go_commits_and_comes_again(
    slurm: dict[str, str], script: str, sent: signal.Signals, code: int, again: bool
) -> None:
    log = Path(slurm["LOG"])
    job = subprocess.Popen(["bash", CLUSTER / "slurm" / f"{script}.sbatch", "my.yaml", "a=b c"], env=slurm)
    try:
        deadline = time.monotonic() + 60
        while not log.exists() or not log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        job.send_signal(sent)
        assert job.wait(60) == code
    finally:
        job.kill()
    lines = log.read_text().splitlines()
    assert lines[0] == f"{script} my.yaml a=b c address=192.0.2.7:6379 mode=token"
    assert ("committed" in lines) == (script != "serve")
    assert ("requeue 17" in lines) == again
    token = Path(slurm["HOME"]) / ".ray" / "auth_token"
    assert re.fullmatch(r"[0-9a-f]{64}", token.read_text())
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_job_that_fails_says_so_and_does_not_come_again(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", CLUSTER / "slurm" / "train.sbatch", "broken"], env=slurm)
    assert done.returncode == 3
    assert "requeue" not in Path(slurm["LOG"]).read_text()
