"""Runs, data and registry on an S3 server, slow, failing, full or closed: nothing is lost, and the run says why."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading

import fsspec
import pytest
import torch
from safetensors.torch import load

from ftray.config import Run
from ftray.data.prepared import PreparedData
from ftray.data.sources import raw_rows
from ftray.errors import ConfigError, RunError
from ftray.manifest import filesystem, read_manifest, verify, write_text
from ftray.registry.publish import publish
from ftray.registry.store import Registry
from ftray.train import commits, writer
from ftray.train.loop import train_worker
from ftray.train.world import World
from tests.s3 import BUCKET, Store, every_third, refusing, waiting
from tests.toys import MemoryData, Recorder, random_rows, toy_run
from tests.unit.test_data_remote import prepare_here

pytestmark = pytest.mark.faults

ROWS = random_rows(64)
STEPS = ("train.steps=6", "train.commit_every=2")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    store = Store()
    yield store
    store.close()


@pytest.fixture
def store(server, monkeypatch, tmp_path):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FTRAY_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("s3").clear_instance_cache()
    server.client().create_bucket(Bucket=BUCKET)
    yield server
    for key in server.names():
        server.client().delete_object(Bucket=BUCKET, Key=key)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The artefact of the run on a local disk that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    trained(toy_run(folder, *STEPS))
    return load((folder / "artefact/adapter_model.safetensors").read_bytes())


def trained(run: Run, channel: Recorder | None = None):
    channel = channel or Recorder()
    return channel, train_worker(run, MemoryData(ROWS), World(), channel)  # type: ignore[arg-type]


def assert_as(unbroken: dict[str, torch.Tensor], folder: str) -> None:
    fs, path = filesystem(folder)
    mine = load(fs.cat_file(f"{path}/artefact/adapter_model.safetensors"))
    assert mine.keys() == unbroken.keys()
    assert all(torch.equal(mine[name], unbroken[name]) for name in mine)
    lines = [json.loads(line) for line in fs.cat_file(f"{path}/metrics.jsonl").splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 7))


def test_a_run_its_resumption_and_the_registry(store, unbroken, tmp_path):
    folder, registry = f"s3://{BUCKET}/whole", f"s3://{BUCKET}/registry"
    run = toy_run(folder, *STEPS)
    with pytest.raises(InterruptedError):
        trained(run, Recorder(fail_at=5))
    assert commits.steps_of(folder) == [2, 4]
    assert verify(commits.place_of(folder, 4))
    channel, summary = trained(run)
    assert summary["resumed_from"] == 4
    assert [event["step"] for event in channel.of("commit")] == [6]
    assert_as(unbroken, folder)
    assert commits.steps_of(folder) == [4, 6], "keep_last"
    secret = store.environment()["AWS_SECRET_ACCESS_KEY"].encode()
    for key in store.names():
        assert secret not in store.client().get_object(Bucket=BUCKET, Key=key)["Body"].read(), key

    published = publish(f"{folder}/artefact", registry, "team", "toy")
    ref = Registry(registry).resolve("team", "toy")
    assert ref == published.ref
    facts, _ = Registry(registry).facts(ref)
    for name, file in facts.files.items():
        Registry(registry).download(ref, name, file.size, tmp_path / name)
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == file.sha256


def test_rows_are_read_and_prepared_on_the_store(store):
    lines = [json.dumps({"text": f"row {i}"}) for i in range(40)]
    write_text(f"s3://{BUCKET}/in/rows.jsonl", "\n".join(lines))
    run = toy_run(
        f"s3://{BUCKET}/data-run",
        f"data.sources=[{{path: 's3://{BUCKET}/in/*.jsonl', format: text}}]",
        "data.held_out_fraction=0.2",
    )
    with store.fault(every_third("503 SlowDown", "drop", "cut")):
        assert len(list(raw_rows(run.data.sources[0]))) == 40
        folder, _ = prepare_here(run, least=1)
        verify(folder)
        data = PreparedData.open(folder)
    assert store.failed
    assert len(data.train) + len(data.held_out) == 40


@pytest.mark.parametrize(
    "kinds", [pytest.param(("503 SlowDown", "500 InternalError"), marks=pytest.mark.long), ("drop", "cut")]
)
def test_every_third_call_fails(store, unbroken, kinds):
    folder = f"s3://{BUCKET}/failing-{len(kinds[0])}"
    with store.fault(every_third(*kinds)):
        with pytest.raises(InterruptedError):
            trained(toy_run(folder, *STEPS), Recorder(fail_at=3))
        trained(toy_run(folder, *STEPS))
    assert store.failed > 10
    assert_as(unbroken, folder)


class Goes(Recorder):
    """Sets `there` after step 3."""

    def __init__(self) -> None:
        super().__init__()
        self.there = threading.Event()

    def emit(self, event):
        super().emit(event)
        if event["kind"] == "step" and event["step"] == 3:
            self.there.set()


def test_the_loop_does_not_wait_for_a_slow_store(store, unbroken):
    folder, channel = f"s3://{BUCKET}/slow", Goes()
    with store.fault(waiting(channel.there, "commits")):
        trained(toy_run(folder, *STEPS), channel)
    told = [(event["kind"], event["step"]) for event in channel.events if event["kind"] in ("step", "commit")]
    assert told.index(("commit", 2)) > told.index(("step", 3)), told
    assert told.index(("commit", 2)) < told.index(("step", 5)), "one at a time"
    assert_as(unbroken, folder)


@pytest.mark.parametrize(
    ("answer", "says"),
    [("507 XMinioStorageFull", "no space is left"), ("403 AccessDenied", "no permission")],
)
def test_a_store_that_takes_no_more_ends_the_run_with_a_reason(store, unbroken, answer, says):
    folder = f"s3://{BUCKET}/closed-{answer[:3]}"
    with store.fault(refusing(answer, "step-00000004")), pytest.raises(RunError, match=says) as raised:
        trained(toy_run(folder, *STEPS))
    assert "step-00000004" in raised.value.where
    assert "very-secret" not in str(raised.value)
    assert read_manifest(commits.place_of(folder, 4)) is None
    _, summary = trained(toy_run(folder, *STEPS))
    assert summary["resumed_from"] == 2
    assert_as(unbroken, folder)


@pytest.fixture
def hasty(store, monkeypatch):
    """A driver that asks once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setattr(writer, "_PAUSES", (0.1, 0.1))
    fsspec.filesystem("s3").clear_instance_cache()
    yield store
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_store_that_falls_silent_is_waited_for(hasty, unbroken):
    store, folder, left = hasty, f"s3://{BUCKET}/silent", iter(["503 SlowDown", "drop"])

    def answer(environ):
        return (
            next(left, None) if environ["REQUEST_METHOD"] == "PUT" and "step-00000002" in environ["PATH_INFO"] else None
        )

    with store.fault(answer):
        channel, _ = trained(toy_run(folder, *STEPS))
    assert any("waits for its store" in event["text"] for event in channel.of("warning"))
    assert_as(unbroken, folder)


@pytest.mark.long
def test_a_store_that_stays_silent_ends_the_run(hasty, unbroken):
    store, folder = hasty, f"s3://{BUCKET}/dead"
    with store.fault(refusing("drop", "step-00000004")), pytest.raises(RunError, match="does not answer"):
        trained(toy_run(folder, *STEPS))
    _, summary = trained(toy_run(folder, *STEPS))
    assert summary["resumed_from"] == 2
    assert_as(unbroken, folder)


def test_a_bucket_that_is_not_there_is_named_and_not_made(store):
    with pytest.raises(RunError, match="no such bucket"):
        trained(toy_run("s3://misspelled/run", *STEPS))
    assert "misspelled" not in [bucket["Name"] for bucket in store.client().list_buckets()["Buckets"]]


def test_nobody_answers(hasty, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(RunError, match="does not answer") as raised:
            commits.steps_of(f"s3://{BUCKET}/anything")
    assert "AWS_ENDPOINT_URL" in raised.value.hint


def test_credentials_that_are_missing_are_asked_for(store, monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("AWS_") and "KEY" in name:
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(RunError, match="no credentials"):
        commits.steps_of(f"s3://{BUCKET}/anything")
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_scheme_without_a_driver_says_what_to_install(monkeypatch):
    from fsspec.registry import known_implementations

    monkeypatch.setitem(known_implementations, "gs", {"class": "no_such_driver.FS", "err": "install gcsfs"})
    with pytest.raises(ConfigError, match=r"nothing here can reach") as raised:
        filesystem("gs://bucket/run")
    assert "ftray[gcs]" in raised.value.hint
