"""A whole run by the command line with rows, run and registry on an S3 server whose every seventh call fails."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest
import yaml

from ftray.registry.store import Registry
from tests.ray.runs import wait_for, write_run
from tests.s3 import BUCKET, Store

pytestmark = pytest.mark.long


def test_everything_on_a_store(tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    store, calls = Store(), itertools.count(1)
    for name, value in store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    client = store.client()
    client.create_bucket(Bucket=BUCKET)
    file = write_run(tmp_path, "stored", train__steps=40)
    run = yaml.safe_load(file.read_text())
    for split, key in (("sources", "train"), ("held_out", "held_out")):
        client.upload_file(str(tmp_path / f"{key}.jsonl"), BUCKET, f"rows/{key}.jsonl")
        run["data"][split][0]["path"] = f"s3://{BUCKET}/rows/{key}.jsonl"
    run["data"].pop("cache")
    run["output"] = folder = f"s3://{BUCKET}/run"
    file.write_text(yaml.safe_dump(run))

    def ftray(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ftray.cli.main", *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)

    def fail_at_times(_):
        return "503 SlowDown" if next(calls) % 7 == 0 else None

    with store.fault(fail_at_times):
        broken = ftray("train", str(file))
        wait_for(lambda: any("step-00000007/manifest.json" in name for name in store.names("run/commits/")))
        broken.kill()
        broken.wait()
        again = ftray("train", str(file), "--json")
        output, _ = again.communicate(timeout=500)
        assert again.returncode == 0, output
    assert store.failed
    assert "very-secret" not in output
    names = store.names("run/")
    for name in ("run.yaml", "summary.json", "metrics.jsonl", "report.html", "artefact/adapter_model.safetensors"):
        assert f"run/{name}" in names
    summary = json.loads(client.get_object(Bucket=BUCKET, Key="run/summary.json")["Body"].read())
    assert summary["resumed_from"] >= 7
    assert b"very-secret" not in client.get_object(Bucket=BUCKET, Key="run/run.yaml")["Body"].read()
    published = ftray("publish", folder, "--as", "team/stored", "--registry", f"s3://{BUCKET}/registry")
    output, _ = published.communicate(timeout=200)
    assert published.returncode == 0, output
    assert Registry(f"s3://{BUCKET}/registry").resolve("team", "stored")
    doctor = ftray("doctor", folder, "--json")
    output, _ = doctor.communicate(timeout=200)
    assert doctor.returncode == 0, output
    assert json.loads(output)["finished"]
    store.close()
