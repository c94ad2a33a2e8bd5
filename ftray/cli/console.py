"""What a run looks like while it goes: events become lines, or on a terminal a progress display over them.

    with open_console(every=10) as console:
        train(run, on_event=console, …)

A console is called with the event dictionaries of preparation and training. Without a terminal each line is plain text,
so that a job's log stays readable.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, TextIO

from ftray.cli.words import count, duration, json_text, percent, some

Event = dict[str, Any]
_PROGRESS_SECONDS = 5.0
"""Plain lines of preparation are this far apart."""
_ENDS = {"stopped": "stopped, and committed", "early stopping": "ended early: held-out loss no longer falls"}


class Pace:
    """How fast the last steps were, and what is left at that pace."""

    def __init__(self, steps: int = 20) -> None:
        self._seconds: deque[float] = deque(maxlen=steps)
        self._tokens: deque[int] = deque(maxlen=steps)

    def add(self, seconds: float, target_tokens: int) -> None:
        self._seconds.append(seconds)
        self._tokens.append(target_tokens)

    @property
    def tokens_per_second(self) -> float:
        """Target tokens."""
        return sum(self._tokens) / max(sum(self._seconds), 1e-9)

    def seconds_left(self, steps: int) -> float | None:
        return sum(self._seconds) / len(self._seconds) * max(steps, 0) if self._seconds else None


class PlainConsole:
    """Plain lines: no colours, nothing that moves. Safe to call from any thread."""

    def __init__(self, out: TextIO, every: int = 10, title: str | None = None) -> None:
        self.out, self.every, self.title = out, every, title
        self.steps = 0
        self.pace = Pace()
        self._warned: set[str] = set()
        self._progress_time = -math.inf
        self._lock = threading.RLock()

    def __enter__(self) -> PlainConsole:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing moves any more; lines may still follow."""

    def __call__(self, event: Event) -> None:
        handler = getattr(self, f"on_{event.get('kind')}", None)
        if handler:  # kinds of a later version are for other readers
            with self._lock:
                handler(event)

    def line(self, text: str) -> None:
        print(f"[{self.title}] {text}" if self.title else text, file=self.out, flush=True)

    # ---------------------------------------------------------------------------------------------------------- events

    def on_status(self, e: Event) -> None:
        self.line(e["text"])

    def on_progress(self, e: Event) -> None:
        done, total = e["done"], e.get("total")
        now = time.monotonic()
        if done != total and now - self._progress_time < _PROGRESS_SECONDS:
            return
        self._progress_time = now
        of = f" of {count(total)}" if total else ""
        self.line(f"{e['what']}: {count(done)}{of} {e.get('unit', '')}".rstrip())

    def on_start(self, e: Event) -> None:
        self.steps = e["steps"]
        for text in describe_start(e):
            self.line(text)

    def on_resume(self, e: Event) -> None:
        whole = self.steps and e["step"] >= self.steps
        text = "that was its last" if whole else "the last commit"
        self.line(f"going on after step {count(e['step'])}, {text}")

    def on_step(self, e: Event) -> None:
        self.pace.add(e["seconds"], e["target_tokens"])
        step = e["step"]
        if step % self.every == 0 or step == self.steps:
            self.line(self.step_text(e))

    def step_text(self, e: Event) -> str:
        left = duration(self.pace.seconds_left(self.steps - e["step"]))
        parts = [
            f"step {count(e['step'])}/{count(self.steps)}",
            f"loss {e['loss']:.4f}",
            f"rate {e['learning_rate']:.2e}",
            f"{count(self.pace.tokens_per_second)} target tokens/s",
        ]
        if "margin" in e:
            parts.insert(2, f"margin {e['margin']:.3f}")
        if e.get("skipped"):
            parts.append(f"{e['skipped']} skipped")
        return " · ".join([*parts, f"{left} left" if e["step"] < self.steps else "done"])

    def on_evaluation(self, e: Event) -> None:
        self.line(evaluation_text(e))

    def on_commit(self, e: Event) -> None:
        self.line(f"committed step {count(e['step'])}: {e['folder']}")

    def on_skip(self, e: Event) -> None:
        rows = e.get("rows") or []
        named = ", ".join(map(str, rows[:3])) + (f" and {count(len(rows) - 3)} more" if len(rows) > 3 else "")
        self.line(f"step {count(e['step'])} skipped, {e['reason']}" + (f"; its rows: {named}" if named else ""))

    def on_warning(self, e: Event) -> None:
        if e["text"] not in self._warned:
            self._warned.add(e["text"])
            self.line(f"warning: {e['text']}")

    def on_end(self, e: Event) -> None:
        self.line(_ENDS.get(e["reason"], "finished"))


class JsonConsole(PlainConsole):
    """Every event as one line of JSON, for programs."""

    def __call__(self, event: Event) -> None:
        named = {"run": self.title, **event} if self.title else event
        with self._lock:
            print(json_text(named), file=self.out, flush=True)


class TerminalConsole(PlainConsole):
    """Lines above, and one display that moves below them: what is done, how well, how fast, and how long yet."""

    def __init__(self, out: TextIO, every: int = 10, title: str | None = None, display: Display | None = None) -> None:
        super().__init__(out, every, title)
        self.display = display or Display(out)
        self._what: str | None = None
        self._held_out = ""

    def close(self) -> None:
        with self._lock:
            self.display.remove(self)
            self._what = None

    def line(self, text: str) -> None:
        from rich.text import Text

        shown = Text(text)
        if text.startswith("warning:") or " skipped, " in text:
            shown.stylize("yellow")
        if self.title:
            shown = Text(f"[{self.title}] ", style="cyan") + shown
        self.display.print(shown)

    def on_status(self, e: Event) -> None:
        self.close()
        super().on_status(e)

    def on_progress(self, e: Event) -> None:
        self._show(e["what"], e.get("total"), e["done"], e.get("unit", ""))
        if e["done"] == e.get("total"):
            self.close()

    def on_start(self, e: Event) -> None:
        self.close()
        super().on_start(e)
        self._show("training", self.steps, e.get("step", 0), "steps")

    def on_step(self, e: Event) -> None:
        self.pace.add(e["seconds"], e["target_tokens"])
        speed = f"{count(self.pace.tokens_per_second)} target tokens/s"
        left = f"{duration(self.pace.seconds_left(self.steps - e['step']))} left"
        text = " · ".join(filter(None, [f"loss {e['loss']:.4f}", self._held_out, speed, left]))
        self._show("training", self.steps, e["step"], text)

    def on_evaluation(self, e: Event) -> None:
        self._held_out = f"held-out {e['loss']:.4f}"
        super().on_evaluation(e)

    def on_end(self, e: Event) -> None:
        self.close()
        super().on_end(e)

    def _show(self, what: str, total: int | None, done: int, text: str) -> None:
        if self._what != what:
            self.close()
            self._what = what
        name = f"[{self.title}] {what}" if self.title else what
        self.display.show(self, name, total, done, text)


class Display:
    """What moves at the bottom of a terminal: a bar for each console that has something under way."""

    def __init__(self, out: TextIO) -> None:
        from rich.console import Console

        self.rich = Console(file=out, highlight=False, soft_wrap=True)
        self._progress: Any = None
        self._tasks: dict[PlainConsole, Any] = {}
        self._lock = threading.RLock()

    def print(self, text: Any) -> None:
        self.rich.print(text)

    def show(self, whose: PlainConsole, name: str, total: int | None, done: int, text: str) -> None:
        with self._lock:
            if self._progress is None:
                self._progress = self._new()
                self._progress.start()
            if whose not in self._tasks:
                self._tasks[whose] = self._progress.add_task(name, total=total, text="")
            self._progress.update(self._tasks[whose], completed=done, total=total, text=text)

    def remove(self, whose: PlainConsole) -> None:
        with self._lock:
            task = self._tasks.pop(whose, None)
            if task is None:
                return
            if self._tasks:
                self._progress.remove_task(task)
            else:
                self._progress.stop()
                self._progress = None

    def _new(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        return Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=self.rich,
            transient=True,
        )


def open_consoles(titles: Sequence[str], every: int, as_json: bool) -> list[PlainConsole]:
    """A console for each of several runs that go on at once."""
    if as_json or not sys.stdout.isatty():
        return [open_console(every, title, as_json) for title in titles]
    display = Display(sys.stdout)
    return [TerminalConsole(sys.stdout, every, title, display) for title in titles]


def open_console(
    every: int = 10, title: str | None = None, as_json: bool = False, out: TextIO | None = None
) -> PlainConsole:
    """The console that fits `out` (standard output): for a program, a terminal, or a log."""
    out = out or sys.stdout
    if as_json:
        return JsonConsole(out, every, title)
    return TerminalConsole(out, every, title) if out.isatty() else PlainConsole(out, every, title)


def describe_start(e: Event) -> list[str]:
    """The lines that open a training: how much, on what, which part of the model."""
    split = batch_split(e["workers"], e["accumulation"])
    lines = [f"training: {some(e['steps'], 'step')} of {some(e['batch_rows'], 'row')} ({split}) on {e['device']}"]
    trained, whole = e["trainable_parameters"], e["parameters"]
    lines.append(f"trained: {count(trained)} of {count(whole)} parameters, {percent(trained / whole)}")
    if names := e.get("unquantized"):
        shown = ", ".join(names[:3]) + (f" and {count(len(names) - 3)} more" if len(names) > 3 else "")
        lines.append(f"warning: NF4 cannot hold {some(len(names), 'layer')}, left unquantized: {shown}")
    return lines


def batch_split(workers: int, accumulation: int) -> str:
    return f"{some(workers, 'worker')} × {some(accumulation, 'micro-batch', 'micro-batches')}"


def evaluation_text(e: Event) -> str:
    of = " (the base)" if e["step"] == 0 else ""
    text = f"held-out at step {count(e['step'])}{of}: loss {e['loss']:.4f}"
    if "perplexity" in e:
        text += f", perplexity {e['perplexity']:.2f}"
    if "margin" in e:
        text += f", margin {e['margin']:.3f}, accuracy {percent(e['accuracy'])}"
    if "target_tokens" in e:
        text += f" over {count(e['target_tokens'])} target tokens in {duration(e.get('seconds'))}"
    return text
