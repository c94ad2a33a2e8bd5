"""Plots as SVG text that stands inside a page: no fixed ink, so that they follow the page's light or dark colours.

matplotlib draws with placeholder colours; each becomes a CSS variable of the page (`--ink`, `--accent`, …), and the
text stays text in the page's own font. Every function returns a whole `<svg>` element with a label for screen readers.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Series = tuple[np.ndarray, np.ndarray]
"""x (steps) and y, of equal length."""

_INK, _FAINT, _ACCENT, _SECOND, _THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--muted", _FAINT: "--line", _ACCENT: "--accent", _SECOND: "--second", _THIRD: "--third"}
_MAX_POINTS = 800
"""More are averaged: a pixel holds one."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ftray",
    "font.family": "DejaVu Sans",  # only measured with: the page's own font is put in its place
    "font.size": 11.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.xmargin": 0.012,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.color": _INK,
}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a Hann window of `window` values centred on each, so that the curve does not lag behind; narrower at
    the ends. Values that are not finite have no weight."""
    weights = np.hanning(window + 2)[1:-1]
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), weights, mode="full")
    weight = np.convolve(known.astype(float), weights, mode="full")
    start = (window - 1) // 2
    inner = slice(start, start + len(values))
    with np.errstate(invalid="ignore"):
        return np.where(weight[inner] > 0, total[inner] / weight[inner], np.nan)


def thin(series: Series, points: int = _MAX_POINTS) -> Series:
    """At most `points` points, each the mean of its neighbours."""
    x, y = series
    if len(x) <= points:
        return series
    parts = np.array_split(np.arange(len(x)), points)
    means = [np.nanmean(y[p]) if np.isfinite(y[p]).any() else np.nan for p in parts]
    return np.array([x[p].mean() for p in parts]), np.array(means)


def loss_curves(
    steps: Series, smoothed: Series, held_out: Series, base: float | None, best_step: int | None, unit: str
) -> str:
    """Training loss raw and smoothed, held-out loss with a mark at each evaluation, the base's as a level line."""

    def draw(axes: Any) -> None:
        if len(steps[0]):
            axes.plot(*thin(steps), color=_ACCENT, alpha=0.3, linewidth=1.1, label="training, each step")
            axes.plot(*thin(smoothed), color=_ACCENT, label="training, smoothed")
        if base is not None:
            axes.axhline(base, color=_INK, linewidth=1.1, dashes=(4, 3), label="held-out, base")
        if len(held_out[0]):
            x, y = held_out
            few = len(x) <= 40
            axes.plot(x, y, color=_SECOND, marker="o" if few else None, markersize=5, label="held-out, tuned")
            if best_step is not None and best_step in x:
                at = y[list(x).index(best_step)]
                axes.plot([best_step], [at], "o", ms=11, mfc="none", mec=_SECOND, mew=1.4, label="the best, kept")
        axes.set_ylabel(f"nats per {unit}")
        _legend(axes)

    return _svg("loss", "Loss against steps: training, and held-out with the base's as a level line", draw, (14, 5.4))


def curve(name: str, label: str, series: Series, unit: str, *, log: bool = False, level: float | None = None) -> str:
    """One small curve against the step. `level`: a line for its median or a limit."""

    def draw(axes: Any) -> None:
        axes.plot(*thin(series), color=_ACCENT, linewidth=1.3)
        if level is not None:
            axes.axhline(level, color=_INK, linewidth=0.9, dashes=(4, 3))
        if log:
            axes.set_yscale("log")
        else:
            finite = series[1][np.isfinite(series[1])]
            axes.set_ylim(bottom=min(0.0, finite.min(initial=0.0)))
        axes.set_ylabel(unit)

    return _svg(name, label, draw, (4.4, 2.7))


def histogram(edges: Sequence[float], counts: Sequence[int], mark: int | None) -> str:
    """Rows by length. `mark`: the longest that is allowed, as a line where it is in sight."""

    def draw(axes: Any) -> None:
        left, right = np.asarray(edges[:-1], float), np.asarray(edges[1:], float)
        axes.bar(left, counts, width=(right - left) * 0.92, align="edge", color=_ACCENT, linewidth=0)
        filled = [r for r, count in zip(right, counts, strict=True) if count]
        top = max(filled, default=1.0) * 1.03
        if mark is not None and mark <= top * 1.25:
            axes.axvline(mark, color=_THIRD, linewidth=1.2, dashes=(4, 3))
            axes.annotate(
                "max_length", (mark, 1), xycoords=("data", "axes fraction"), xytext=(-4, -2), ha="right", va="top",
                textcoords="offset points", color=_THIRD, fontsize=10.5,
            )  # fmt: skip
            top = max(top, mark * 1.02)
        axes.set_xlim(0, top)
        axes.set_xlabel("tokens a row")
        axes.set_ylabel("rows")
        axes.grid(visible=False, axis="x")

    return _svg("lengths", "Histogram of the rows' lengths in tokens", draw, (6.8, 3.8), x_label=None)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), borderaxespad=0.2,
            handlelength=1.8, columnspacing=1.8, handletextpad=0.5,
        )  # fmt: skip


def _svg(
    name: str, label: str, draw: Callable[[Any], None], size: tuple[float, float], *, x_label: str | None = "step"
) -> str:
    """Draw on one pair of axes and return the element. `size` is in inches of 72 pixels, as wide as the page shows it,
    so that the text has one size in all plots."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if x_label:
            axes.set_xlabel(x_label)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "linear" and type(axis.get_major_formatter()).__name__ == "ScalarFormatter":
                axis.set_major_formatter(_short_number())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _embed(text.getvalue(), name, label)


def _short_number() -> Any:
    """1,500 → 1,500; 25000 → 25k; 0.0002 → 2e-4: tick labels of even width."""
    from matplotlib.ticker import FuncFormatter

    def show(value: float, _: int) -> str:
        size = abs(value)
        if size >= 1e6:
            return f"{value / 1e6:g}M"
        if size >= 1e4:
            return f"{value / 1e3:g}k"
        if size == 0 or size >= 1e-3:
            return f"{value:,.6g}"
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"

    return FuncFormatter(show)


def _embed(svg: str, name: str, label: str) -> str:
    """The `<svg>` element alone: ids made unique by `name`, colours by variables, no size in points, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = svg.replace("font-family: 'DejaVu Sans'", "font-family: var(--sans)")
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*pt"', "", head)
    title = html.escape(label, quote=True)
    return f'{head} role="img" aria-label="{title}"><title>{title}</title>{rest.strip()}'
