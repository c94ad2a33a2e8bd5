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
_TEXT = "#060606"
_VARIABLES = {
    _TEXT: "--ink",
    _INK: "--muted",
    _FAINT: "--line",
    _ACCENT: "--accent",
    _SECOND: "--second",
    _THIRD: "--third",
}
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
    steps: Series,
    smoothed: Series,
    held_out: Series,
    base: float | None,
    best_step: int | None,
    unit: str,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """Training loss raw and smoothed, held-out loss with a mark at each evaluation, the base's as a level line. `marks`
    are steps with what was found there."""

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
        for number, (step, what) in enumerate(marks):
            axes.axvline(step, color=_THIRD, linewidth=1.2, dashes=(2, 2))
            left = step < sum(axes.get_xlim()) / 2
            axes.annotate(
                what, (step, 1), xycoords=("data", "axes fraction"), xytext=(5 if left else -5, -3 - 15 * number),
                ha="left" if left else "right", va="top", textcoords="offset points", color=_THIRD, fontsize=11,
            )  # fmt: skip
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


def heat_map(rows: Sequence[str], columns: Sequence[str], values: np.ndarray, own: Sequence[int | None]) -> str:
    """[rows, columns]: change of loss since the base, fallen in one colour, risen in another; NaN is left empty. A cell
    with an outline is a system's own task."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    small = len(columns) > 12

    def draw(axes: Any) -> None:
        for i in range(len(rows)):
            for j in range(len(columns)):
                value = values[i, j]
                if np.isnan(value):
                    continue
                share = (abs(value) / most) ** 0.5  # small changes are to be seen beside large ones
                colour = to_rgba(_ACCENT if value < 0 else _SECOND, 0.75 * share)
                axes.add_patch(Rectangle((j, i), 1, 1, facecolor=colour[:3], alpha=colour[3], linewidth=0))
                if not small:
                    text = f"{value:+.2f}" if abs(value) >= 0.005 else "0"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=_TEXT, fontsize=10.5)
        for i, task in enumerate(own):
            if task is not None:
                axes.add_patch(Rectangle((task, i), 1, 1, fill=False, edgecolor=_TEXT, linewidth=1.1))
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=50 if len(columns) > 3 else 0,
                        ha="right" if len(columns) > 3 else "center")  # fmt: skip
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axes.grid(visible=False)

    height = min(1.6 + (0.28 if small else 0.42) * len(rows), 14)
    return _svg("heat", "Change of each system's loss on each task since the base", draw, (14, height), x_label=None)


def held_out_curves(runs: Sequence[tuple[str, Series]], unit: str) -> str:
    """Held-out losses of several runs, told apart by colour and by stroke."""
    strokes = [(None, None), (5, 2), (1, 1.5), (8, 2, 1, 2)]

    def draw(axes: Any) -> None:
        for number, (name, (x, y)) in enumerate(runs):
            colour = (_ACCENT, _SECOND, _THIRD)[number % 3]
            (line,) = axes.plot(x, y, color=colour, marker="o", markersize=4, label=name)
            dashes = strokes[number // 3 % len(strokes)]
            if dashes[0] is not None:
                line.set_dashes(dashes)
        axes.set_ylabel(f"nats per {unit}")
        axes.legend(loc="upper right")

    return _svg("runs", "Held-out losses of the runs against steps", draw, (14, 5.4))


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
