"""What workers on other machines are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftray.session import in_a_package, usable_cpus, worker_environment


def test_no_secret_reaches_rays_logs():
    environment = {
        "HF_HOME": "/cache",
        "HF_TOKEN": "hf_secret",
        "HF_HUB_TOKEN": "hf_secret",
        "FTRAY_DATA": "/data",
        "FTRAY_API_KEY": "secret",
        "NCCL_SOCKET_IFNAME": "eth1",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_ENDPOINT": "https://anna:secret@mirror.example",
        "FTRAY_REGISTRY": "s3://bucket/adapters?token=secret",
    }
    passed = worker_environment(environment, verbose=False)
    assert not [value for value in passed.values() if "secret" in value]
    assert {"HF_HOME", "FTRAY_DATA", "NCCL_SOCKET_IFNAME"} <= passed.keys()


def test_how_threads_wait_is_the_users_to_say() -> None:
    assert worker_environment({}, verbose=False)["GOMP_SPINCOUNT"] == "1000"
    assert worker_environment({"GOMP_SPINCOUNT": "7"}, verbose=False)["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    ("limits", "cpus"),
    [
        ({}, 8),
        ({"": "max 100000"}, 8),
        ({"": "250000 100000"}, 3),
        ({"": "1600000 100000"}, 8),
        ({"": "10000 100000"}, 1),
        ({"pods/own": "max 100000", "pods": "400000 100000"}, 4),
        ({"pods/own": "200000 100000", "pods": "400000 100000"}, 2),
        ({"pods/other": "100000 100000"}, 8),
        ({"": "nonsense"}, 8),
    ],
)
def test_cpus_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits, cpus) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(f"{limit}\n")
    own = tmp_path / "own"
    assert usable_cpus(tmp_path, own) == (cpus if "" in limits or not limits else 8), "no cgroup file: the root's limit"
    own.write_text("12:cpu:/elsewhere\n0::/pods/own\n")
    assert usable_cpus(tmp_path, own) == cpus
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert usable_cpus(tmp_path, own) == 1


def test_nobody_counts_the_machines_cpus_instead() -> None:
    root = Path(__file__).parents[2]
    files = [path for part in ("ftray", "serve") for path in (root / part).rglob("*.py")]
    assert [f.name for f in files if "cpu_count" in f.read_text(encoding="utf-8")] == ["session.py"]


@pytest.mark.parametrize("there", ["package", "below it", "elsewhere", "no job"])
def test_a_jobs_own_folder_is_known(tmp_path, monkeypatch, there):
    """`ray job submit --working-dir`: the job begins in the package that Ray unpacked."""
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    (package / "below").mkdir(parents=True)
    monkeypatch.chdir({"below it": package / "below", "elsewhere": tmp_path}.get(there, package))
    runtime_env = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"} if there != "no job" else None}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(runtime_env))
    assert in_a_package() is (there in ("package", "below it"))


def test_loading_a_base_imports_no_compiler_and_says_nothing():
    """bitsandbytes would do both: a second of a processor in each process, and a line of its own on some of them."""
    told = "print('torch._inductor.compile_fx' in sys.modules, os.environ.get('TORCHDYNAMO_DISABLE'))"
    code = f"import os, sys, ftray.model.load; {told}"
    program = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "None"]
    assert "gemm_4bit" not in done.stderr
