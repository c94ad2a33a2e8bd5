"""The learning rate of a step, as a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ftray.config import Schedule


def warmup_steps(schedule: Schedule, steps: int) -> int:
    """Steps of warm-up: as given, or the share of all steps, rounded up; of a share, the last step is beyond it."""
    warmup = schedule.warmup
    share = isinstance(warmup, float) and warmup < 1
    return min(math.ceil(warmup * steps), max(steps - 1, 0)) if share else int(warmup)


def rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The rate of step 0…steps-1 as a share of the peak.

    As in transformers, warm-up rises as step / warmup from 0, and decay would reach `final` at step `steps`.
    """
    warmup = warmup_steps(schedule, steps)
    if step < warmup:
        return step / warmup
    floor = schedule.final
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        decay = max(1, round(schedule.decay * steps))
        left = min(1.0, (steps - step) / decay)
        return floor + (1 - floor) * left
    done = (step - warmup) / max(1, steps - warmup)
    shape = 1 - done if schedule.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * shape
