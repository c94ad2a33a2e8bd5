"""The trackers behind `ftray.train.sinks`. Each is imported, opened and written to on a thread of its own."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import time
import uuid
from typing import Any

from ftray.config import Run
from ftray.errors import UserError
from ftray.manifest import filesystem, is_local, join, read_text, write_text
from ftray.redact import redact_values
from ftray.storage import make_folder


class Point:
    """The numbers of one step under the names that trackers show: {"train/loss": 1.2, …}; always finite."""

    def __init__(self, step: int, values: dict[str, float], seconds: float) -> None:
        self.step, self.values, self.seconds = step, values, seconds


class TensorBoard:
    """Event files in `RUN/tensorboard/`, written record by record: TensorBoard's own format, without importing torch.

    A resumed run writes a file of its own that starts with SessionLog.START at `first_step`: TensorBoard then forgets
    the points from there on that the interrupted run wrote after its last commit.
    """

    name = "TensorBoard"

    def __init__(self, folder: str, first_step: int) -> None:
        self._folder, self._first_step = join(folder, "tensorboard"), first_step

    def open(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._Event, self._Summary = Event, Summary
        fs, path = filesystem(self._folder)
        make_folder(fs, path)
        # TensorBoard reads the files of a folder in the order of their names: the time comes first
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = fs.open(f"{path}/{name}", "wb")
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._first_step:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=self._first_step, session_log=start))
        self._file.flush()

    def write(self, points: list[Point]) -> None:
        for point in points:
            values = [self._Summary.Value(tag=tag, simple_value=value) for tag, value in point.values.items()]
            self._add(self._Event(wall_time=point.seconds, step=point.step, summary=self._Summary(value=values)))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())


class MLflow:
    """One MLflow run per run folder, found again on resume; the resolved run as parameters."""

    name = "MLflow"

    def __init__(self, run: Run, folder: str) -> None:
        self._run, self._folder = run, folder

    def open(self) -> None:
        # MLflow's defaults would keep a dead server's thread busy for many minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow = _extra("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient(tracking_uri=self._run.logging.mlflow)
        self._id = remembered_id(self._folder, "mlflow")
        if self._id is None:
            self._id = self._create()
            remember_id(self._folder, "mlflow", self._id)
        else:
            self._client.update_run(self._id, status="RUNNING")

    def _create(self) -> str:
        found = self._client.get_experiment_by_name("ftray")
        experiment = found.experiment_id if found else self._client.create_experiment("ftray")
        run_id = self._client.create_run(experiment, run_name=self._run.name).info.run_id
        parameters = [self._entities.Param(k, v[:500]) for k, v in parameters_of(self._run).items()]
        for at in range(0, len(parameters), 100):  # MLflow takes 100 parameters a call
            self._client.log_batch(run_id, params=parameters[at : at + 100])
        return run_id

    def write(self, points: list[Point]) -> None:
        metrics = [
            self._entities.Metric(tag, value, int(point.seconds * 1000), point.step)
            for point in points
            for tag, value in point.values.items()
        ]
        for at in range(0, len(metrics), 1000):  # and 1,000 metrics
            self._client.log_batch(self._id, metrics=metrics[at : at + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class WandB:
    """One W&B run per run folder, found again on resume; the resolved run as its configuration."""

    name = "W&B"

    def __init__(self, run: Run, folder: str) -> None:
        self._run, self._folder = run, folder

    def open(self) -> None:
        wandb = _extra("wandb")
        # silent from the start: else W&B asks for an account in the middle of the progress line when it has no key
        wandb.setup(settings=wandb.Settings(silent=True))
        run_id = remembered_id(self._folder, "wandb")
        if run_id is None:
            run_id = uuid.uuid4().hex[:12]
            remember_id(self._folder, "wandb", run_id)
        self._tracked = wandb.init(
            project=self._run.logging.wandb,
            name=self._run.name,
            id=run_id,
            resume="allow",
            dir=_local_folder(self._folder),
            config=redact_values(self._run.dump()),
            settings=wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True),
        )
        self._tracked.define_metric("step")
        self._tracked.define_metric("*", step_metric="step")

    def write(self, points: list[Point]) -> None:
        for point in points:
            self._tracked.log({**point.values, "step": point.step})

    def close(self) -> None:
        self._tracked.finish(exit_code=0)


def _extra(name: str) -> Any:
    """An optional package. Raises UserError that names the extra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name != name:
            raise
        raise UserError(f"the package {name} is not installed; run: pip install 'ftray[{name}]'") from None


def parameters_of(run: Run) -> dict[str, str]:
    """The resolved run, flat: {"train.learning_rate": "0.0002", …}, without credentials."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict | list) and value:
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = "null" if value is None else str(value)

    walk("", redact_values(run.dump()))
    return flat


def remembered_id(folder: str, tracker: str) -> str | None:
    """The tracker's id of this run folder from before, None for a new one."""
    try:
        return read_text(_id_file(folder, tracker)).strip() or None
    except FileNotFoundError:
        return None


def remember_id(folder: str, tracker: str, value: str) -> None:
    write_text(_id_file(folder, tracker), value + "\n")


def _id_file(folder: str, tracker: str) -> str:
    return join(folder, "trackers", f"{tracker}.id")


def _local_folder(folder: str) -> str | None:
    return filesystem(folder)[1] if is_local(folder) else None
