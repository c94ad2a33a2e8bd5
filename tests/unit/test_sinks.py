"""Sinks: real TensorBoard files, a real MLflow store, a real offline W&B run; a failing sink hurts nobody."""

from __future__ import annotations

import http.server
import json
import math
import sys
import threading
import time
from pathlib import Path

import pytest

from ftray.config import parse_run
from ftray.redact import redact
from ftray.train import sinks, trackers
from ftray.train.sinks import Sinks


def _run(**logging):
    return parse_run(
        f"""
name: cheese
model: {{path: embedded}}
method: {{name: lora}}
data: {{sources: [{{path: "s3://user:hunter2hunter2@bucket/rows.jsonl", format: text}}]}}
train: {{steps: 5}}
logging: {json.dumps(logging)}""",
        "cheese.yaml",
    )


def _step(step: int, loss: float | None = None, **more) -> dict:
    loss = 1 / step if loss is None else loss
    return {"kind": "step", "step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 0.5, "time": 1e9, **more}


def _feed(run, folder, events, first_step=0) -> list[dict]:
    warnings: list[dict] = []
    tracked = Sinks(run, str(folder), first_step, warnings.append)
    for event in events:
        tracked.event(event)
    tracked.close()
    return warnings


def _scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(point.step, pytest.approx(point.value)) for point in found.Scalars(tag)]


def test_tensorboard_reads_what_was_written(tmp_path):
    events = [
        {"kind": "status", "text": "training"},
        {"kind": "evaluation", "step": 0, "loss": 4.0, "perplexity": math.exp(4)},
        _step(1),
        _step(2, loss=float("nan")),
        _step(3),
    ]
    assert _feed(_run(tensorboard=True), tmp_path, events) == []
    assert _scalars(tmp_path, "train/loss") == [(1, 1.0), (3, 1 / 3)]
    assert _scalars(tmp_path, "train/learning_rate") == [(1, 1e-3), (2, 1e-3), (3, 1e-3)]
    assert _scalars(tmp_path, "held_out/loss") == [(0, 4.0)]


def test_a_resumed_run_replaces_the_points_after_its_commit(tmp_path):
    run = _run(tensorboard=True)
    _feed(run, tmp_path, [_step(s, loss=9.0) for s in (1, 2, 3, 4)])
    _feed(run, tmp_path, [_step(s, loss=1.0) for s in (3, 4, 5)], first_step=3)
    assert _scalars(tmp_path, "train/loss") == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0), (5, 1.0)]


def test_nothing_is_written_when_nothing_is_asked_for(tmp_path):
    assert _feed(_run(tensorboard=False), tmp_path, [_step(1)]) == []
    assert list(tmp_path.iterdir()) == []


def test_a_sink_that_cannot_write_is_switched_off_with_one_warning(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    warnings = _feed(_run(tensorboard=True), tmp_path, [_step(s) for s in range(1, 200)])
    assert [w["kind"] for w in warnings] == ["warning"]
    assert "TensorBoard is switched off" in warnings[0]["text"]


class _Broken:
    """A tracker whose server goes away after the first points."""

    name = "Broken"

    def __init__(self, error: BaseException) -> None:
        self.error, self.written = error, 0

    def open(self) -> None:
        pass

    def write(self, points) -> None:
        self.written += 1
        raise self.error

    def close(self) -> None:
        raise AssertionError("a sink that failed is not closed")


@pytest.mark.parametrize("error", [RuntimeError("gone\nand more"), SystemExit(3), ValueError()])
def test_a_failing_sink_leaves_the_others_alone(tmp_path, monkeypatch, error):
    broken, good = _Broken(error), trackers.TensorBoard(str(tmp_path), 0)
    monkeypatch.setattr(sinks, "_sinks_of", lambda *_: [broken, good])
    warnings: list[dict] = []
    tracked = Sinks(_run(), str(tmp_path), 0, warnings.append)
    tracked.event(_step(1))
    deadline = time.monotonic() + 10
    while not warnings and time.monotonic() < deadline:
        tracked.event({"kind": "status", "text": "still training"})
        time.sleep(0.01)
    for step in range(2, 6):
        tracked.event(_step(step))
    tracked.close()
    assert len(warnings) == 1
    assert warnings[0]["text"].startswith("Broken is switched off: ")
    assert "and more" not in warnings[0]["text"]
    assert broken.written == 1
    assert [step for step, _ in _scalars(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


class _Stuck(_Broken):
    """A tracker that never answers."""

    def __init__(self) -> None:
        super().__init__(RuntimeError())
        self.release = threading.Event()

    def write(self, points) -> None:
        self.release.wait(60)


def test_a_stuck_sink_delays_neither_the_run_nor_its_end(tmp_path, monkeypatch):
    stuck = _Stuck()
    monkeypatch.setattr(sinks, "_sinks_of", lambda *_: [stuck])
    monkeypatch.setattr(sinks, "_CLOSE_SECONDS", 0.3)
    began = time.monotonic()
    warnings = _feed(_run(), tmp_path, [_step(s) for s in range(1, 500)])
    stuck.release.set()
    assert time.monotonic() - began < 30
    assert "did not finish" in warnings[0]["text"]


def test_a_sink_that_lags_is_given_up_before_memory_grows(tmp_path, monkeypatch):
    stuck = _Stuck()
    monkeypatch.setattr(sinks, "_sinks_of", lambda *_: [stuck])
    monkeypatch.setattr(sinks, "_QUEUED_EVENTS", 50)
    warnings = _feed(_run(), tmp_path, [_step(s) for s in range(1, 100)])
    stuck.release.set()
    assert len(warnings) == 1
    assert "lags" in warnings[0]["text"]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_extra_names_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    value = {"mlflow": "http://localhost:1", "wandb": "cheeses"}[name]
    [warning] = _feed(_run(tensorboard=False, **{name: value}), tmp_path, [_step(1)])
    assert f"pip install 'ftray[{name}]'" in warning["text"]


def test_mlflow_keeps_one_run_a_folder(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("alembic", reason="the extra mlflow is not installed")
    store = f"sqlite:///{tmp_path}/store.db"
    run = _run(tensorboard=False, mlflow=store)
    assert _feed(run, tmp_path, [_step(1), _step(2)]) == []
    assert _feed(run, tmp_path, [_step(3), {"kind": "evaluation", "step": 3, "loss": 0.3}], first_step=2) == []
    client = mlflow.MlflowClient(tracking_uri=store)
    [found] = client.search_runs([client.get_experiment_by_name("ftray").experiment_id])
    run_id = (tmp_path / "trackers" / "mlflow.id").read_text().strip()
    assert (found.info.run_id, found.info.run_name, found.info.status) == (run_id, "cheese", "FINISHED")
    assert [m.step for m in client.get_metric_history(run_id, "train/loss")] == [1, 2, 3]
    assert found.data.metrics["held_out/loss"] == pytest.approx(0.3)
    assert found.data.params["train.steps"] == "5"
    assert "hunter2" not in str(found.data.params)
    assert found.data.params["data.sources.0.path"] == "s3://***@bucket/rows.jsonl"


def test_a_tracking_server_that_refuses_is_no_more_than_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, *_) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://tenant:hunter2hunter2@127.0.0.1:{server.server_port}"
    try:
        [warning] = _feed(_run(tensorboard=False, mlflow=uri), tmp_path, [_step(1)])
    finally:
        server.shutdown()
        server.server_close()
    assert "MLflow is switched off" in warning["text"]
    assert "hunter2" not in warning["text"]


def test_wandb_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = _run(tensorboard=False, wandb="cheeses")
    assert _feed(run, tmp_path, [_step(1), _step(2)]) == []
    [record] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"train/loss" in content
    assert b"hunter2" not in content


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://bob:pa55word@host/x", "at https://***@host/x"),
        ("gs://b/x?X-Goog-Signature=abcdef0123456789&v=1", "gs://b/x?X-Goog-Signature=***&v=1"),
        ("Authorization: Bearer abcdefghijklmnop", "Authorization: Bearer ***"),
        ("WANDB_API_KEY=0123456789abcdef is wrong", "WANDB_API_KEY=*** is wrong"),
        ("max_length: 1024, tokens: 12345678901234", "max_length: 1024, tokens: 12345678901234"),
        ("mail bob@example.org about s3://bucket/rows@2", "mail bob@example.org about s3://bucket/rows@2"),
    ],
)
def test_redaction(text, shown):
    assert redact(text) == shown


def test_margins_of_preferences_are_shown(tmp_path):
    evaluation = {"kind": "evaluation", "step": 1, "loss": 0.6, "margin": 0.25, "accuracy": 0.75}
    told = {"margin": 0.5, "accuracy": 1.0, "chosen_reward": 0.25, "rejected_reward": -0.25}
    _feed(_run(tensorboard=True), tmp_path, [_step(1, **told), evaluation])
    for name, value in told.items():
        assert _scalars(tmp_path, f"train/{name}") == [(1, value)]
    assert _scalars(tmp_path, "held_out/margin") == [(1, 0.25)]
    assert _scalars(tmp_path, "held_out/accuracy") == [(1, 0.75)]
