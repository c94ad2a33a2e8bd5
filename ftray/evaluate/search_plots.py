"""Plots of a search, drawn as `plots` draws a run's."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftray.evaluate.plots import _ACCENT, _INK, _SECOND, _svg

Line = tuple[Sequence[float], Sequence[float]]
"""Steps and values of one trial."""


def curves(lines: Sequence[Line], ended: Sequence[bool], best: int | None, metric: str) -> str:
    """Each trial's curve: those that ran to their end, those that were stopped, and the best on top."""

    def draw(axes: Any) -> None:
        for i, (x, y) in enumerate(lines):
            if i != best and len(x):
                width, alpha = (1.3, 0.55) if ended[i] else (1.0, 0.45)
                axes.plot(x, y, color=_ACCENT if ended[i] else _INK, linewidth=width, alpha=alpha,
                          marker="o" if len(x) == 1 else None, markersize=3)  # fmt: skip
        if best is not None:
            axes.plot(*lines[best], color=_SECOND, linewidth=2.4, marker="o", markersize=4)
        known = np.array([v for _, y in lines for v in y if math.isfinite(v)])
        if len(known):
            low, high = known.min(), np.quantile(known, 0.97)  # what diverged may leave the picture
            margin = 0.05 * (high - low) or 0.1
            axes.set_ylim(low - margin, high + margin)
        axes.set_ylabel(metric)

    return _svg("curves", f"Held-out {metric} of every trial against its steps", draw, (14, 5.0))


def parallel(
    parameters: Sequence[dict[str, Any]], values: Sequence[float], best: int | None, metric: str, descending: bool
) -> str:
    """Parallel coordinates: an axis for each parameter and one for the result; each trial is a line, the better the
    stronger."""
    keys = list(dict.fromkeys(key for p in parameters for key in p))
    axes_of = [_Axis(key, [p.get(key) for p in parameters]) for key in keys]
    axes_of.append(_Axis(metric, list(values), upward=not descending))
    order = np.argsort(np.argsort([-v if descending else v for v in values]))
    standing = 1 - order / max(1, len(values) - 1)

    def draw(axes: Any) -> None:
        at = np.arange(len(axes_of))
        places = np.array([axis.places for axis in axes_of]).T
        for i in np.argsort(standing):
            if i != best:
                strength = float(standing[i])
                axes.plot(at, places[i], color=_ACCENT, alpha=0.12 + 0.6 * strength**2, linewidth=0.8 + 0.9 * strength)
        if best is not None:
            axes.plot(at, places[best], color=_SECOND, linewidth=2.6)
        for x, axis in zip(at, axes_of, strict=True):
            axes.axvline(x, color=_INK, linewidth=0.8)
            for place, text in axis.ticks:
                axes.annotate(text, (x, place), xytext=(5, 0), textcoords="offset points", va="center",
                              color=_INK, fontsize=10)  # fmt: skip
        names = [axis.name for axis in axes_of]
        axes.set_xticks(at, names)
        axes.set_xlim(-0.08, len(axes_of) - 1 + 0.35)
        axes.set_ylim(-0.06, 1.06)
        axes.set_yticks([])
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    label = f"Parallel coordinates: each trial's parameters and its {metric}"
    return _svg("parallel", label, draw, (14, 4.8), x_label=None)


class _Axis:
    """One parameter from 0 to 1: numbers by size, or by their logarithm where they span more than a factor of 20;
    other values in a row. A trial without it is at the very bottom."""

    def __init__(self, name: str, values: list[Any], upward: bool = True) -> None:
        self.name = name
        numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        missing = values.count(None)
        if len(numbers) + missing == len(values) and numbers:
            low, high = min(numbers), max(numbers)
            log = low > 0 and high / low > 20

            def place(value: Any) -> float:
                if value is None:
                    return -0.05
                if high == low:
                    return 0.5
                share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
                return share if upward else 1 - share

            distinct = sorted(set(numbers))
            shown = distinct if len(distinct) <= 6 else _even(low, high, log)
            self.places = [place(v) for v in values]
            self.ticks = [(place(v), f"{v:.4g}" if len(distinct) <= 6 else f"{v:.3g}") for v in shown]
        else:
            names = sorted({_word(v) for v in values if v is not None})
            step = 1 / max(1, len(names) - 1)
            self.places = [-0.05 if v is None else names.index(_word(v)) * step for v in values]
            self.ticks = [(i * step, n) for i, n in enumerate(names)]


def _even(low: float, high: float, log: bool) -> list[float]:
    return [float(v) for v in (np.geomspace if log else np.linspace)(low, high, 4)]


def _word(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 16 else text[:15] + "…"


def bars(shares: dict[str, float]) -> str:
    """Importance of each parameter, the largest on top."""
    names = list(shares)[::-1]

    def draw(axes: Any) -> None:
        axes.barh(names, [shares[n] for n in names], color=_ACCENT, height=0.62)
        for i, name in enumerate(names):
            axes.annotate(f"{100 * shares[name]:.0f} %", (shares[name], i), xytext=(5, 0), textcoords="offset points",
                          va="center", color=_INK, fontsize=10.5)  # fmt: skip
        axes.set_xlim(0, max(0.25, *shares.values()) * 1.15)
        axes.set_xlabel("share of the variation")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)

    return _svg("importance", "Importance of each parameter", draw, (6.8, 1.3 + 0.42 * len(names)), x_label=None)


def trade_offs(points: Sequence[tuple[float, float]], front: Sequence[int], names: Sequence[str]) -> str:
    """Two metrics of every trial, and the line of those that none other beats."""

    def draw(axes: Any) -> None:
        axes.plot(*zip(*points, strict=True), "o", color=_ACCENT, alpha=0.55, markersize=6)
        line = sorted(points[i] for i in front)
        axes.plot(*zip(*line, strict=True), "o-", color=_SECOND, markersize=7, linewidth=1.6)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])

    return _svg("front", f"{names[0]} against {names[1]}", draw, (14, 4.6), x_label=None)
