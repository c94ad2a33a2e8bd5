"""What a search knows, on disk: SEARCH/search.jsonl, a line an event, each written before it is acted on.

A search that is taken up again reads nothing else. A line that a crash cut off never counted.

    {"kind": "trial", "index": 7, "parameters": {…}}             it was proposed
    {"kind": "begin", "index": 7, "steps": 250}                  its rows are prepared, and so its steps are known
    {"kind": "result", "index": 7, "step": 50, "loss": 1.2, …}   an evaluation
    {"kind": "stop", "index": 7, "step": 50}                     the scheduler ended it there
    {"kind": "change", "index": 7, "parameters": {…}, …}         population based training changed it: it goes on
                                                                 from the commit of step `source_step` of trial `source`
    {"kind": "fail", "index": 7, "error": "…", "aside": true}    it failed; with `aside` for good
    {"kind": "finish", "index": 7, "summary": {…}}               it ran to its end
"""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from ftray.config.search import PLANNED, Search
from ftray.errors import ArtefactError
from ftray.manifest import filesystem, is_local, join, read_text, write_text

SOURCE = "source.json"
"""In a trial's folder: the commit of another trial that it went on from, and the number of that change."""

State = Literal["open", "stopped", "finished", "aside"]


@dataclass
class Trial:
    """One trial as the ledger has it."""

    index: int
    parameters: dict[str, Any]
    planned: dict[str, float] = field(default_factory=dict)
    """What the memory plan says: `memory` (GiB), `trained` (parameters)."""
    steps: int | None = None
    """Of the whole run, once it was begun."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """Evaluations after the first step, in the order of their steps."""
    state: State = "open"
    error: str | None = None
    failures: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.index:04d}"

    @property
    def step(self) -> int:
        """Steps it has made, as far as they were judged."""
        return self.results[-1]["step"] if self.results else 0

    @property
    def trained_tokens(self) -> float:
        """Target tokens it was trained on."""
        return self.results[-1].get("trained_tokens") or 0 if self.results else 0

    def values(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric at each evaluation, those that are finite."""
        return self._values(metric, self.results)

    def _values(self, metric: str, results: list[dict[str, Any]]) -> list[tuple[int, float]]:
        if metric in PLANNED:
            return [(self.step, self.planned[metric])] if metric in self.planned else []
        found = ((r["step"], r.get(metric)) for r in results)
        return [(step, value) for step, value in found if isinstance(value, int | float) and math.isfinite(value)]

    @property
    def line(self) -> list[dict[str, Any]]:
        """Evaluations of the weights that it has: since it was changed last, that of the commit which it went on from,
        and those after it."""
        if not self.changes:
            return self.results
        change = self.changes[-1]
        return [*change["taken"], *(r for r in self.results if r["step"] > change["source_step"])]

    def best(self, search: Search, which: int = 0) -> tuple[int, float] | None:
        """(step, value) of the best evaluation by metric number `which`; None without one."""
        better = min if search.modes[which] == "min" else max
        return better(self._values(search.metric[which], self.line), key=lambda pair: pair[1], default=None)

    def scores(self, search: Search) -> list[float] | None:
        """The best value by each metric, or None where one is missing."""
        found = [self.best(search, i) for i in range(len(search.metric))]
        return [pair[1] for pair in found if pair] if all(found) else None


def changes_made(folder: str) -> int:
    """How many changes the commits in a trial's folder have been through."""
    try:
        return orjson.loads(read_text(join(folder, SOURCE)))["changes"]
    except (FileNotFoundError, ValueError, KeyError):
        return 0


class Ledger:
    """The file, and the trials that follow from it. Writing is safe from any thread, and for one process alone, which
    holds the lease of the folder (`ftray.train.lease`). Raises ArtefactError for a file that is damaged before its last
    line."""

    def __init__(self, folder: str) -> None:
        self.uri = join(folder, "search.jsonl")
        self.trials: list[Trial] = []
        self.seconds_before = 0.0
        """Time that earlier parts of the search took."""
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._text = b""
        self._local: Path | None = Path(filesystem(self.uri)[1]) if is_local(folder) else None
        self._load()

    def _load(self) -> None:
        try:
            raw = self._local.read_bytes() if self._local else read_text(self.uri).encode()
        except FileNotFoundError:
            raw = b""
        whole = raw[: raw.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                event = orjson.loads(line)
                self._apply(event)
                self.seconds_before = max(self.seconds_before, event.get("at", 0.0))
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise ArtefactError(
                    f"line {number} is none that a search wrote there: {reason}",
                    where=self.uri,
                    hint=f"move line {number} and those after it out of the file: the same command goes on from what is"
                    " before them, and trials from their own commits",
                ) from None
        if self._local:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            if len(whole) < len(raw):
                os.truncate(self._local, len(whole))
        else:
            self._text = whole

    @property
    def seconds(self) -> float:
        """Time of the whole search so far, earlier parts included."""
        return self.seconds_before + time.monotonic() - self._started

    def write(self, kind: str, **event: Any) -> None:
        """Make an event last, then count it."""
        line = orjson.dumps({"kind": kind, **event, "at": round(self.seconds, 3)}, option=orjson.OPT_APPEND_NEWLINE)
        with self._lock:
            if self._local:
                with open(self._local, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            else:  # an object store has no append: the file is small, and goes there whole
                self._text += line
                write_text(self.uri, self._text.decode())
            self._apply(orjson.loads(line))

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        if kind == "trial":
            if event["index"] != len(self.trials):
                raise ValueError(f"trial {event['index']} is proposed where trial {len(self.trials)} would be next")
            self.trials.append(Trial(event["index"], event["parameters"], event.get("planned", {})))
            return
        if "index" not in event:
            return
        trial = self.trials[event["index"]]
        if kind == "begin":
            trial.steps = event["steps"]
        elif kind == "result":
            kept = {key: value for key, value in event.items() if key not in ("kind", "index", "at")}
            trial.results = [r for r in trial.results if r["step"] < event["step"]] + [kept]
        elif kind == "stop":
            trial.state = "stopped"
        elif kind == "finish":
            trial.state, trial.summary = "finished", event["summary"]
        elif kind == "fail":
            trial.error, trial.failures = event["error"], trial.failures + 1
            if event["aside"]:
                trial.state = "aside"
        elif kind == "change":
            at, source = event.get("source_step", event["step"]), self.trials[event["source"]]
            taken = [r for r in source.line if r["step"] == at]
            kept = {key: value for key, value in event.items() if key not in ("kind", "index", "at")}
            trial.parameters = event["parameters"]
            trial.changes.append(kept | {"source_step": at, "taken": taken})
            trial.results = [r for r in trial.results if r["step"] <= at]  # what it did after that is undone
