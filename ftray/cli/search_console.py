"""What a search looks like while it goes: a line for what happens to a trial, or on a terminal one live table."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from ftray.cli.console import Event, JsonConsole, PlainConsole, TerminalConsole
from ftray.cli.words import count, duration, some

_ROWS = 18
"""Trials in the live table at most."""
_STATES = {"open": "waits", "running": "runs", "stopped": "stopped", "finished": "finished", "aside": "set aside"}


@dataclass
class Row:
    """One trial as the console knows it."""

    index: int
    parameters: dict[str, Any]
    state: str = "open"
    steps: int | None = None
    step: int = 0
    value: float | None = None
    """By the first metric, at the last evaluation."""
    best: float | None = None


@dataclass
class Standing:
    """What the events of a search add up to."""

    metric: str = "loss"
    mode: str = "min"
    total: int = 0
    rows: dict[int, Row] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def begin(self, e: Event) -> None:
        self.metric, self.mode, self.total = e["metric"][0], e["mode"][0], e["total"]
        for t in e["trials"]:
            value = t["values"].get(self.metric)
            self.rows[t["index"]] = Row(t["index"], t["parameters"], t["state"], None, t["steps"], value, value)

    def result(self, e: Event) -> Row:
        row = self.rows[e["index"]]
        row.step, row.value = e["step"], e.get(self.metric)
        if self.better(row.value, row.best):
            row.best = row.value
        return row

    def better(self, value: float | None, than: float | None) -> bool:
        if value is None or not math.isfinite(value):
            return False
        return than is None or (value < than if self.mode == "min" else value > than)

    def ranked(self) -> list[Row]:
        """Trials with a value, the best first."""
        sign = 1 if self.mode == "min" else -1
        return sorted((r for r in self.rows.values() if r.best is not None), key=lambda r: (sign * r.best, r.index))  # type: ignore[operator]

    def table_rows(self, most: int) -> list[Row]:
        """What a table of `most` rows shows: those that run, then the best of the others."""
        running = [r for r in self.rows.values() if r.state == "running"][:most]
        others = [r for r in self.ranked() if r.state != "running"][: max(0, most - len(running))]
        return sorted([*running, *others], key=lambda r: r.index)

    def counts(self) -> str:
        states = [row.state for row in self.rows.values()]
        named = [(states.count(s), _STATES[s]) for s in ("running", "finished", "stopped", "aside")]
        text = " · ".join(f"{count(n)} {word}" for n, word in named if n)
        return f"{count(len(self.rows))} of {count(self.total)} trials" + (f": {text}" if text else "")


class SearchConsole(PlainConsole):
    """Plain lines, one for each trial that begins, is stopped, fails or ends, and for each new best."""

    def __init__(self, out: TextIO, every: int = 10, title: str | None = None) -> None:
        super().__init__(out, every, title)
        self.standing = Standing()
        self._best: float | None = None

    def on_search(self, e: Event) -> None:
        self.standing.begin(e)
        if known := len(e["trials"]):
            self.line(f"going on with {some(known, 'trial')} that {'was' if known == 1 else 'were'} begun")
        self._best = next((row.best for row in self.standing.ranked()), None)

    def on_trial(self, e: Event) -> None:
        self.standing.rows[e["index"]] = Row(e["index"], e["parameters"])

    def on_trial_started(self, e: Event) -> None:
        row = self.standing.rows[e["index"]]
        row.state, row.steps = "running", e["steps"]
        after = f" after step {count(e['step'])}" if e["step"] else ""
        self.line(f"trial {row.index:04d} starts{after}: {parameters_text(row.parameters)}")

    def on_trial_result(self, e: Event) -> None:
        row = self.standing.result(e)
        if self.standing.better(row.value, self._best):
            self._best = row.value
            value = f"{self.standing.metric} {row.value:.4f}"
            self.line(f"trial {row.index:04d} at step {count(row.step)}: {value}, the best so far")

    def on_trial_stopped(self, e: Event) -> None:
        row = self.standing.rows[e["index"]]
        row.state = "stopped"
        self.line(f"trial {row.index:04d} stopped at step {count(e['step'])}{self._value(row)}")

    def on_trial_finished(self, e: Event) -> None:
        row = self.standing.rows[e["index"]]
        row.state = "finished"
        self.line(f"trial {row.index:04d} finished{self._value(row)}")

    def on_trial_failed(self, e: Event) -> None:
        if e["index"] not in self.standing.rows:
            self.standing.rows[e["index"]] = Row(e["index"], {})
        self.standing.rows[e["index"]].state = "aside" if e["aside"] else "running"
        what = "failed and is set aside" if e["aside"] else "failed, and is tried again"
        self.line(f"warning: trial {e['index']:04d} {what}: {e['error']}")

    def on_trial_lost(self, e: Event) -> None:
        self.line(f"warning: trial {e['index']:04d} lost its Ray Tune actor; another goes on with it")

    def on_trial_changed(self, e: Event) -> None:
        row = self.standing.rows[e["index"]]
        row.parameters = e["parameters"]
        self.line(f"trial {row.index:04d} goes on from another's weights: {parameters_text(row.parameters)}")

    def _value(self, row: Row) -> str:
        return f": {self.standing.metric} {row.best:.4f}" if row.best is not None else ""


class SearchTerminal(TerminalConsole, SearchConsole):
    """The live table, and lines above it for what does not fit a table."""

    _QUIET = ("on_trial_started", "on_trial_result", "on_trial_stopped", "on_trial_finished")

    def __init__(self, out: TextIO, every: int = 10, title: str | None = None) -> None:
        super().__init__(out, every, title)
        from rich.console import Console

        self._console = Console(file=out, highlight=False)
        self._live: Any = None

    def __call__(self, event: Event) -> None:
        with self._lock:
            name = f"on_{event.get('kind')}"
            if name in self._QUIET:
                self._silently(name, event)
            else:
                super().__call__(event)
            if event.get("kind", "").startswith("trial"):
                self._refresh()

    def _silently(self, name: str, event: Event) -> None:
        line, self.line = self.line, lambda text: None  # type: ignore[method-assign]
        try:
            getattr(SearchConsole, name)(self, event)
        finally:
            self.line = line  # type: ignore[method-assign]

    def line(self, text: str) -> None:
        if self._live is None:
            super().line(text)
        else:
            self._live.console.print(text, style="yellow" if text.startswith("warning:") else None, markup=False)

    def close(self) -> None:
        super().close()
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def _refresh(self) -> None:
        from rich.live import Live

        if self._live is None:
            TerminalConsole.close(self)
            self._live = Live(console=self._console, refresh_per_second=4, get_renderable=self._table, transient=True)
            self._live.start()

    def _table(self) -> Any:
        from rich.table import Table

        standing = self.standing
        shown = Table(box=None, pad_edge=False, caption_justify="left")
        shown.caption = f"{standing.counts()} · {duration(time.monotonic() - standing.began)}"
        for head in ("trial", ""):
            shown.add_column(head, no_wrap=True)
        for head in ("step", standing.metric, "best"):
            shown.add_column(head, justify="right", no_wrap=True)
        shown.add_column("parameters", overflow="ellipsis", no_wrap=True)
        best = next(iter(standing.ranked()), None)
        for row in standing.table_rows(_ROWS):
            step = f"{count(row.step)}/{count(row.steps)}" if row.steps else count(row.step)
            cells = [f"{row.index:04d}", _STATES[row.state], step, _number(row.value), _number(row.best)]
            style = "bold green" if row is best else "dim" if row.state in ("stopped", "aside") else ""
            shown.add_row(*cells, parameters_text(row.parameters), style=style)
        return shown


def open_search_console(*, as_json: bool = False, out: TextIO | None = None) -> PlainConsole:
    """The console that fits `out` (standard output): for a program, a terminal, or a log."""
    out = out or sys.stdout
    if as_json:
        return JsonConsole(out)
    return SearchTerminal(out) if out.isatty() else SearchConsole(out)


def parameters_text(parameters: dict[str, Any]) -> str:
    """`learning_rate=0.003 schedule.name=wsd`: the last part of each key that says something, the whole where two end
    alike."""
    ends = [".".join(key.split(".")[-2 if key.endswith(".name") else -1 :]) for key in parameters]
    names = {key: end if ends.count(end) == 1 else key for key, end in zip(parameters, ends, strict=True)}
    return " ".join(f"{names[key]}={_value(value)}" for key, value in parameters.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    return str(value).replace(" ", "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
