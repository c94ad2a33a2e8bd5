"""A run's numbers for Prometheus: gauges beside Ray's own on the metrics page of the driver's node.

Ray puts `ray_` before every name, and forgets the series once the driver has ended. A dashboard and alerts that draw
them lie in `cluster/observability/`.
"""

from __future__ import annotations

from ftray.train.trackers import Point

STEP = ("ftray_train_step", "The last optimizer step.")
GAUGES = {
    "train/loss": ("ftray_train_loss", "Loss of the last step, nats a target token."),
    "train/learning_rate": ("ftray_train_learning_rate", "Rate of the last step."),
    "train/grad_norm": ("ftray_train_grad_norm", "Norm of the whole gradient, before clipping."),
    "train/epoch": ("ftray_train_epoch", "Passes over the mixture so far."),
    "train/skipped_steps": ("ftray_train_skipped_steps", "Steps whose loss or gradient was not finite, of the run."),
    "speed/target_tokens_per_second": ("ftray_train_target_tokens_per_second", "Of all workers together."),
    "speed/step_seconds": ("ftray_train_step_seconds", "What the last step took."),
    "held_out/loss": ("ftray_train_held_out_loss", "Of the last evaluation, nats a target token."),
}
"""{name of a point's value: (name of the gauge without `ray_`, help)}"""


class Gauges:
    """A sink; see `ftray.train.sinks`. The process must be connected to Ray."""

    name = "Prometheus"

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}

    def open(self) -> None:
        from ray.util.metrics import Gauge

        self._step = Gauge(*STEP, tag_keys=("run",))
        self._gauges = {key: Gauge(name, text, tag_keys=("run",)) for key, (name, text) in GAUGES.items()}

    def write(self, points: list[Point]) -> None:
        self._step.set(points[-1].step, tags=self._tags)
        for key, gauge in self._gauges.items():
            if values := [point.values[key] for point in points if key in point.values]:
                gauge.set(values[-1], tags=self._tags)

    def close(self) -> None:
        """Nothing to finish: Ray's agent takes the last values within seconds."""
