"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, MLflow, Weights & Biases, Prometheus on a cluster.

    sinks = Sinks(run, folder, first_step, on_event)
    sinks.event({"kind": "step", "step": 10, "loss": 1.2, …})
    sinks.close()

It runs in the driver. Each sink has a thread of its own, so that a tracker that is slow, unreachable or broken costs
the run nothing: it is switched off with one warning event, the others go on, and the run never hears of it otherwise.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from ftray.config import Run
from ftray.redact import redact
from ftray.session import in_a_job
from ftray.train.gauges import Gauges
from ftray.train.trackers import MLflow, Point, TensorBoard, WandB

Event = dict[str, Any]

_QUEUED_EVENTS = 20_000
"""Events kept for a sink that lags behind; beyond it the sink is given up, so that memory stays bounded."""
_CLOSE_SECONDS = 30.0
"""What all sinks together may take to finish once the run has ended."""

_STEP_METRICS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "target_tokens_per_second": "speed/target_tokens_per_second",
    "seconds": "speed/step_seconds",
    "epoch": "train/epoch",
    "skipped": "train/skipped_steps",
}
_EVALUATION_METRICS = {"loss": "held_out/loss", "perplexity": "held_out/perplexity"}
for _name in ("margin", "accuracy", "chosen_reward", "rejected_reward"):  # of preferences
    _STEP_METRICS[_name], _EVALUATION_METRICS[_name] = f"train/{_name}", f"held_out/{_name}"


class Sink(Protocol):
    """One tracker. All methods are called on its own thread; any of them may raise."""

    name: str

    def open(self) -> None: ...

    def write(self, points: list[Point]) -> None:
        """Some points in the order of their steps, as many as have gathered."""

    def close(self) -> None: ...


def point_of(event: Event) -> Point | None:
    """What an event has to say to a tracker; None for events without numbers. A loss that is not finite is left out:
    trackers store it as zero, or refuse it."""
    names = {"step": _STEP_METRICS, "evaluation": _EVALUATION_METRICS}.get(event.get("kind", ""))
    if names is None:
        return None
    numbers = {shown: event.get(key) for key, shown in names.items()}
    values = {k: float(v) for k, v in numbers.items() if isinstance(v, int | float) and math.isfinite(v)}
    return Point(int(event["step"]), values, float(event.get("time") or time.time())) if values else None


class Sinks:
    """The sinks that `run.logging` asks for, in `folder`, from `first_step` on (0, or where a resumed run goes on).

    `on_event` receives the warnings, on the thread that calls `event` and `close`.
    """

    def __init__(self, run: Run, folder: str, first_step: int, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._threads = [_SinkThread(sink) for sink in _sinks_of(run, folder, first_step)]

    def event(self, event: Event) -> None:
        """Hand an event over and return at once. Never raises."""
        point = point_of(event)
        for thread in self._threads:
            if point is not None:
                thread.put(point)
        self._report_failures()

    def close(self) -> None:
        """Let the sinks finish, for half a minute at most. Never raises; may be called again."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.finish()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                thread.give_up(f"it did not finish within {_CLOSE_SECONDS:.0f} s of the run's end")
        self._report_failures()
        self._threads = []

    def _report_failures(self) -> None:
        failed = [t for t in self._threads if t.failure]
        self._threads = [t for t in self._threads if not t.failure]
        for thread in failed:
            text = f"{thread.sink.name} is switched off: {thread.failure}; the run goes on, metrics.jsonl has it all"
            self._on_event({"kind": "warning", "text": text})


class _SinkThread(threading.Thread):
    def __init__(self, sink: Sink) -> None:
        super().__init__(name=f"sink {sink.name}", daemon=True)
        self.sink = sink
        self.failure: str | None = None
        self._queue: queue.Queue[Point | None] = queue.Queue(_QUEUED_EVENTS)
        self.start()

    def put(self, point: Point) -> None:
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            self.give_up(f"it lags {_QUEUED_EVENTS:,} steps behind")

    def finish(self) -> None:
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self.give_up(f"it lags {_QUEUED_EVENTS:,} steps behind")

    def give_up(self, why: str) -> None:
        self.failure = self.failure or why

    def run(self) -> None:
        try:
            self.sink.open()
            while self.failure is None:
                points, ended = self._gather()
                if points:
                    self.sink.write(points)
                if ended:
                    break
            self.sink.close()
        except (Exception, SystemExit) as error:  # noqa: BLE001  a tracker may raise anything; the warning carries it
            self.give_up(describe(error))

    def _gather(self) -> tuple[list[Point], bool]:
        """Wait for a point, then take all that have gathered: (points, whether the run has ended)."""
        points: list[Point] = []
        item = self._queue.get()
        while item is not None:
            points.append(item)
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return points, False
        return points, True


def describe(error: BaseException) -> str:
    """One line about an error of a tracker, without credentials."""
    lines = str(error).strip().splitlines()
    text = redact(lines[0]) if lines else ""
    return (text if len(text) <= 300 else text[:299] + "…") or type(error).__name__


def _sinks_of(run: Run, folder: str, first_step: int) -> list[Sink]:
    sinks: list[Sink] = []
    if run.logging.tensorboard:
        sinks.append(TensorBoard(folder, first_step))
    if run.logging.mlflow:
        sinks.append(MLflow(run, folder))
    if run.logging.wandb:
        sinks.append(WandB(run, folder))
    if in_a_job():
        sinks.append(Gauges(run.name))
    return sinks
