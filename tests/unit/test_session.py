"""What workers on other machines are told."""

from __future__ import annotations

import json

import pytest

from ftray.session import in_a_package, worker_environment


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


@pytest.mark.parametrize("there", ["package", "below it", "elsewhere", "no job"])
def test_a_jobs_own_folder_is_known(tmp_path, monkeypatch, there):
    """`ray job submit --working-dir`: the job begins in the package that Ray unpacked."""
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    (package / "below").mkdir(parents=True)
    monkeypatch.chdir({"below it": package / "below", "elsewhere": tmp_path}.get(there, package))
    runtime_env = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"} if there != "no job" else None}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(runtime_env))
    assert in_a_package() is (there in ("package", "below it"))
