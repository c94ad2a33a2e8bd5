"""What went wrong in a run, told from its curves: pure rules, each with its reason in words.

The thresholds are rules of thumb, set so that runs made to have a fault are found and healthy ones are left alone
(tests/evaluate/test_diagnosis.py trains both). A run without held-out rows is judged by its training loss alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ftray.evaluate.plots import smooth
from ftray.evaluate.record import RunRecord

Kind = Literal["divergence", "rate too high", "overfitting", "memorised rows", "underfitting"]

RISE = 0.03
"""Held-out loss that ends this share above its lowest has risen."""
SPIKE = 0.15
"""Training loss this share above where it began means that steps were too long."""
SKIPPED = 0.05
"""Share of steps without a finite loss that is no accident."""
MOVED = 0.03
"""A run whose held-out loss fell by less than this share of the base's has hardly learned."""
FALLING = 0.15
"""Share of the whole gain that came in the last quarter of the steps: there was more to come."""
MEMORISED = 0.25
"""Training loss below this share of the held-out one, after two epochs or more."""


@dataclass(frozen=True)
class Curves:
    """A run's losses. Steps count from 1; held-out ones may have 0, the base's."""

    steps: np.ndarray
    losses: np.ndarray
    """Training loss of each step; NaN where it was not finite."""
    held_out_steps: np.ndarray
    held_out: np.ndarray
    planned: int
    """Steps that the run was to have."""
    epochs: float = 0.0
    skipped: int = 0
    learning_rate: float | None = None

    @classmethod
    def of(cls, record: RunRecord) -> Curves:
        steps, losses = record.series("step", "loss")
        held_out_steps, held_out = record.series("evaluation", "loss")
        known = np.isfinite(held_out)
        last = record.last("step")
        rate = (record.run.get("train") or {}).get("learning_rate")
        return cls(
            steps,
            losses,
            held_out_steps[known],
            held_out[known],
            planned=int(record.last("start").get("steps") or (steps[-1] if len(steps) else 0)),
            epochs=float(last.get("epoch") or 0.0),
            skipped=len(record.of("skip")),
            learning_rate=float(rate) if isinstance(rate, int | float) else None,
        )

    def smoothed(self) -> np.ndarray:
        """The training loss with the noise of single batches taken out."""
        return smooth(self.losses, max(3, len(self.losses) // 25))


@dataclass(frozen=True)
class Finding:
    kind: Kind
    reason: str
    """What in the curves says so."""
    advice: str
    step: int
    """From which step on."""
    keep: int | None = None
    """The step whose commit is the one to keep."""


def diagnose(curves: Curves) -> list[Finding]:
    """What is wrong, the gravest first; nothing for a healthy run, or one that has hardly begun."""
    if not len(curves.steps) or not np.isfinite(curves.losses).any():
        return []
    found = [*_divergence(curves)]
    found += [] if found else [*_rate(curves)]
    broken = bool(found)
    found += _overfitting(curves) if not broken else []
    found += _memorised(curves)
    found += _underfitting(curves) if not found else []
    return found


def _divergence(curves: Curves) -> Iterator[Finding]:
    steps, smoothed = curves.steps, curves.smoothed()
    known = smoothed[np.isfinite(smoothed)]
    lower = "lower train.learning_rate (a tenth is a good first try), or lengthen the warm-up"
    if curves.skipped > SKIPPED * len(steps) and curves.skipped > 2:
        text = f"{curves.skipped:,} of {len(steps):,} steps had no finite loss or gradient"
        yield Finding("divergence", text, lower, int(steps[np.argmax(~np.isfinite(curves.losses))]))
        return
    if len(known) < 5:
        return
    start, lowest, last = _start(curves), float(known.min()), float(known[-1])
    at = int(np.nanargmin(smoothed))
    climbed = last > lowest + 0.5 * max(start - lowest, 0.0) and last > (1 + SPIKE) * lowest and at < 0.9 * len(steps)
    if last > (1 + SPIKE) * start or climbed:
        text = (
            f"training loss began at {start:.3f}, fell to {lowest:.3f} at step {int(steps[at]):,}, and stood at"
            f" {last:.3f} in the end"
        )
        yield Finding("divergence", text, lower, int(steps[at]))


def _rate(curves: Curves) -> Iterator[Finding]:
    """The loss leapt up before it fell, or never got under what the base has."""
    smoothed = curves.smoothed()
    if len(smoothed) < 5:
        return
    start, highest = _start(curves), float(np.nanmax(smoothed))
    at = int(np.nanargmax(smoothed))
    rate = f" {curves.learning_rate:g}" if curves.learning_rate else ""
    if highest > (1 + SPIKE) * start:
        text = (
            f"training loss rose from {start:.3f} to {highest:.3f} at step {int(curves.steps[at]):,} before it fell to"
            f" {float(smoothed[np.isfinite(smoothed)][-1]):.3f}: the rate{rate} is more than these weights bear"
        )
        yield Finding("rate too high", text, "lower train.learning_rate, to a tenth first", int(curves.steps[at]))
        return
    base, after = _base(curves), _after(curves)
    if base is not None and len(after) and float(after.min()) > (1 + RISE) * base:
        text = f"held-out loss is {float(after.min()):.3f} at best after tuning, and was {base:.3f} before it"
        first = int(curves.held_out_steps[curves.held_out_steps > 0][0])
        yield Finding("rate too high", text, "lower train.learning_rate, to a tenth first", first)


def _overfitting(curves: Curves) -> Iterator[Finding]:
    tuned = curves.held_out_steps > 0
    steps, losses = curves.held_out_steps[tuned], curves.held_out[tuned]
    if len(losses) < 2:
        return
    best = int(np.argmin(losses))
    lowest, last = float(losses[best]), float(losses[-1])
    smoothed = curves.smoothed()
    then, now = _at(curves, smoothed, int(steps[best])), float(smoothed[np.isfinite(smoothed)][-1])
    if best < len(losses) - 1 and last > (1 + RISE) * lowest and now < then:
        step = int(steps[best])
        text = (
            f"from step {step:,} on held-out loss rises, from {lowest:.3f} to {last:.3f}, while training loss goes on"
            f" falling, from {then:.3f} to {now:.3f}"
        )
        advice = f"keep the commit of step {step:,} (train.keep_best does); fewer epochs, more rows, or dropout"
        yield Finding("overfitting", text, advice, step, keep=step)


def _memorised(curves: Curves) -> Iterator[Finding]:
    smoothed = curves.smoothed()
    now = float(smoothed[np.isfinite(smoothed)][-1])
    held_out = _after(curves)
    if curves.epochs < 2:
        return
    if len(held_out):
        best = float(held_out.min())
        if now < MEMORISED * best:
            text = (
                f"after {curves.epochs:.1f} epochs training loss is {now:.3f}, held-out loss {best:.3f} at its best:"
                " the model says the training rows by heart"
            )
            yield Finding(
                "memorised rows", text, "fewer epochs, or more and other rows", _below(curves, smoothed, best)
            )
    elif now < 0.05:
        text = f"after {curves.epochs:.1f} epochs training loss is {now:.3f} nats a token: the rows are known by heart"
        advice = "hold rows out (data.held_out_fraction) to see what else was learned; fewer epochs"
        yield Finding("memorised rows", text, advice, _below(curves, smoothed, 0.2))


def _underfitting(curves: Curves) -> Iterator[Finding]:
    base, after = _base(curves), _after(curves)
    last_step = int(curves.steps[-1])
    if base is None or not len(after) or last_step < curves.planned:  # not ended yet
        return
    gain = base - float(after.min())
    if gain < MOVED * base:
        text = f"held-out loss is {float(after.min()):.3f} after {last_step:,} steps, and was {base:.3f} before"
        yield Finding("underfitting", text, "more steps, a higher rate, or a larger rank", last_step)
        return
    tuned = curves.held_out_steps > 0
    early = (curves.held_out_steps <= 0.75 * last_step) & tuned
    if early.any() and tuned.sum() >= 3:
        then, now = float(curves.held_out[early][-1]), float(curves.held_out[-1])
        at = int(curves.held_out_steps[early][-1])
        if then - now > FALLING * gain:
            share = (then - now) / gain
            text = (
                f"held-out loss was still falling at the end: {then:.3f} at step {at:,}, {now:.3f} at step"
                f" {last_step:,}, which is {100 * share:.0f} % of all that was gained"
            )
            yield Finding("underfitting", text, "more steps, or a higher rate", at)


def _start(curves: Curves) -> float:
    """Loss before anything was learned: the first step's, or the base's held-out one where that is higher."""
    first = float(curves.losses[np.isfinite(curves.losses)][0])
    base = _base(curves)
    return max(first, base) if base is not None and math.isfinite(base) else first


def _base(curves: Curves) -> float | None:
    at = np.flatnonzero(curves.held_out_steps == 0)
    return float(curves.held_out[at[0]]) if len(at) else None


def _after(curves: Curves) -> np.ndarray:
    return curves.held_out[curves.held_out_steps > 0]


def _at(curves: Curves, values: np.ndarray, step: int) -> float:
    """The value at a step, or at the last one before it."""
    before = values[(curves.steps <= step) & np.isfinite(values)]
    return float(before[-1]) if len(before) else float(values[np.isfinite(values)][0])


def _below(curves: Curves, values: np.ndarray, level: float) -> int:
    """The first step from which the values stay below a level."""
    above = np.flatnonzero(~(values < level))
    first = int(above[-1]) + 1 if len(above) else 0
    return int(curves.steps[min(first, len(curves.steps) - 1)])


def in_words(findings: Sequence[Finding]) -> list[str]:
    """One line a finding: what, why, what to do."""
    return [f"{finding.kind}: {finding.reason}; {finding.advice}" for finding in findings]
