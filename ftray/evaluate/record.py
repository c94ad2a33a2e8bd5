"""What a run's folder tells, read leniently: a run that was killed, or is still going, leaves some of it out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from ftray.errors import ArtefactError, UserError
from ftray.evaluate.plots import Series
from ftray.manifest import MANIFEST, filesystem, join, read_text
from ftray.redact import redact

Event = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read. `facts` are the prepared data's (empty where they are gone)."""

    folder: str
    text: str
    """run.yaml as it stands, without credentials."""
    run: dict[str, Any]
    events: list[Event]
    summary: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation/result.json` of `ftray evaluate`."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """`evaluation/answers.jsonl`: one for each question."""
    matrix: dict[str, Any] = field(default_factory=dict)
    """`evaluation/matrix.json` of `ftray evaluate --matrix`."""

    def of(self, *kinds: str) -> list[Event]:
        return [e for e in self.events if e.get("kind") in kinds]

    def last(self, kind: str) -> Event:
        """The newest event of a kind, empty where there is none."""
        return next((e for e in reversed(self.events) if e.get("kind") == kind), {})

    def by_step(self, kind: str) -> list[Event]:
        """Events of a kind in the order of their steps; of a step that was made again after a crash, the newest."""
        newest = {e["step"]: e for e in self.of(kind) if isinstance(e.get("step"), int)}
        return [newest[step] for step in sorted(newest)]

    def series(self, kind: str, key: str) -> Series:
        """(steps, values) of a number; where it was not finite, NaN."""
        events = self.by_step(kind)
        return np.array([e["step"] for e in events]), np.array([_number(e.get(key)) for e in events])


def read_record(folder: str) -> RunRecord:
    """Read a run's folder, a path or any fsspec URI. Raises UserError where there is no run.yaml."""
    try:
        text = read_text(join(folder, "run.yaml"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("this folder holds no run.yaml, so it is not a run", where=folder) from None
    run = yaml.safe_load(text)
    if not isinstance(run, dict):
        raise UserError("run.yaml is not a mapping of keys", where=folder)
    return RunRecord(
        folder=folder,
        text=redact(text),
        run=run,
        events=_events(join(folder, "metrics.jsonl")),
        summary=_mapping(join(folder, "summary.json")),
        facts=data_facts(folder),
        evaluation=_mapping(join(folder, "evaluation", "result.json")),
        answers=_objects(join(folder, "evaluation", "answers.jsonl")),
        matrix=_mapping(join(folder, "evaluation", "matrix.json")),
    )


def data_facts(folder: str) -> dict[str, Any]:
    """The facts of the data that a run was prepared with; empty where they cannot be found any more.

    `data.json` points to them, else they lie in the run's own `data/`, where the newest counts.
    """
    uri = _mapping(join(folder, "data.json")).get("uri")
    for place in [uri] if isinstance(uri, str) else _own_data(folder):
        facts = _mapping(join(place, MANIFEST)).get("facts")
        if isinstance(facts, dict):
            return facts
    return {}


def _own_data(folder: str) -> list[str]:
    """Folders that may hold prepared data, the newest first."""
    fs, path = filesystem(join(folder, "data"))
    try:
        manifests = fs.glob(f"{path}/*/{MANIFEST}") + fs.glob(f"{path}/{MANIFEST}")
        newest = sorted(manifests, key=lambda p: str(_changed(fs.info(p))), reverse=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [fs.unstrip_protocol(p.rsplit("/", 1)[0]) for p in newest]


def _changed(info: dict[str, Any]) -> Any:
    return next((info[k] for k in ("mtime", "LastModified", "updated", "last_modified") if k in info), "")


def _mapping(uri: str) -> dict[str, Any]:
    """A JSON object, empty where the file is missing or cut off."""
    try:
        value = json.loads(read_text(uri))
    except (OSError, ValueError, ArtefactError):
        return {}
    return value if isinstance(value, dict) else {}


def _events(uri: str) -> list[Event]:
    """The lines of metrics.jsonl that are events."""
    return [event for event in _objects(uri) if isinstance(event.get("kind"), str)]


def _objects(uri: str) -> list[dict[str, Any]]:
    """The lines of a JSONL file; the last may be cut off by a crash, and is then none."""
    try:
        lines = read_text(uri).splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
