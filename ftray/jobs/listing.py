"""Runs, from what their folders and a cluster's jobs say of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from ftray.errors import EXIT_STOPPED, DataError
from ftray.jobs.cluster import Job
from ftray.manifest import filesystem, join, read_text

NAME, FOLDERS, COMMAND = "job_name", "ftray.runs", "ftray.command"
"""Keys of a job's metadata: its name, [[run's name, folder], …] as JSON, and the command as the user gave it."""

FRESH_SECONDS = 120.0
"""A lease may outlive a killed job for so long."""
Held = Callable[[str], bool]
"""Whether a lease in a run's or search's folder is that of a living process; see `ftray.train.lease`, which stands on
a higher floor."""
_TAIL_BYTES = 256 << 10
STATES = ("waiting", "running", "finished", "stopped", "failed", "interrupted")


@dataclass(frozen=True)
class RunState:
    """A run as it stands. None: not known."""

    name: str
    state: str
    """waiting: its job has not begun. interrupted: it ended without a word, and the same command goes on."""
    command: str | None = None
    """`train`, `tune`, …"""
    step: int | None = None
    of: int | None = None
    loss: float | None = None
    """Of the last step."""
    held_out: float | None = None
    folder: str | None = None
    job: str | None = None
    changed: float | None = None
    """When it last moved, seconds since 1970."""
    exit_code: int | None = None
    unread: str | None = None
    """Why its folder cannot be read from here; what only the folder knows is then not known."""

    def to_json(self, now: float | None = None) -> dict[str, Any]:
        age = None if self.changed is None else max(0.0, (now or time.time()) - self.changed)
        return asdict(self) | {"age_seconds": age}


# ------------------------------------------------------------------------------------------------------------- folders


def folders_in(place: str) -> list[str]:
    """The folders of runs and searches: `place` itself, or those right below it. Raises DataError where there is no
    such folder."""
    fs, root = filesystem(place)
    if not fs.exists(root):
        raise DataError("there is no such folder", where=place)
    if any(fs.exists(f"{root}/{file}") for file in ("run.yaml", "search.yaml")):
        return [place]
    names = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False) if entry != root)
    below = [join(place, name) for name in names if not name.startswith(".")]
    return [f for f in below if any(fs.exists(f"{filesystem(f)[1]}/{file}") for file in ("run.yaml", "search.yaml"))]


def look(folder: str, held: Held) -> RunState | None:
    """What a run's or search's folder says; None where it holds neither. Whether a run is at work its lease tells: on
    an object store its metrics move only with its commits."""
    fs, root = filesystem(folder)
    if fs.exists(f"{root}/search.yaml"):
        return _search(folder, held(folder))
    if not fs.exists(f"{root}/run.yaml"):
        return None
    run = _yaml(join(folder, "run.yaml"))
    events, changed = _events(join(folder, "metrics.jsonl"))
    return from_events(run, folder, events, changed, held(folder))


def unread(folder: str, why: str) -> RunState:
    """Of a folder that cannot be read from here."""
    return RunState(_last_part(folder), "?", folder=folder, unread=why)


def _last_part(folder: str) -> str:
    return folder.rstrip("/").rsplit("/", 1)[-1]


def from_events(
    run: dict[str, Any], folder: str, events: Sequence[dict[str, Any]], changed: float | None, held: bool
) -> RunState:
    """Of a run's resolved file, the last lines of its metrics, oldest first, and whether somebody is at work there."""
    train = run.get("train") or {}
    of, step, loss, held_out, end = train.get("steps"), None, None, None, None
    for event in events:
        kind = event.get("kind")
        if kind == "start":
            of, end = event.get("steps", of), None
        elif kind == "step":
            step, loss, end = event["step"], event.get("loss"), None
        elif kind == "evaluation":
            held_out = event.get("loss")
        elif kind == "end":
            end = event.get("reason")
    if held:
        state = "running"
    elif end is not None:
        state = "stopped" if end == "stopped" else "finished"
    else:
        state = "interrupted"
    return RunState(
        str(run.get("name") or _last_part(folder)),
        state,
        command="train",
        step=step,
        of=of,
        loss=loss,
        held_out=held_out,
        folder=folder,
        changed=changed,
    )


def _search(folder: str, held: bool) -> RunState:
    """Trials stand for steps."""
    spec = _yaml(join(folder, "search.yaml"))
    fs, root = filesystem(folder)
    trials = list(fs.glob(f"{root}/trials/*/summary.json"))
    outcome = f"{root}/outcome.json"
    files = [*trials, outcome, f"{root}/search.yaml", f"{root}/search.jsonl"]
    changed = max([_modified(fs, path) or 0.0 for path in files if fs.exists(path)])
    done = fs.exists(outcome)
    held_out = None
    if done:
        best = json.loads(read_text(join(folder, "outcome.json"))).get("best") or {}
        held_out = (best.get("values") or {}).get("loss")
    state = "finished" if done else "running" if held else "interrupted"
    name = str(spec.get("name") or _last_part(folder))
    return RunState(
        name,
        state,
        command="tune",
        step=len(trials),
        of=spec.get("samples"),
        held_out=held_out,
        folder=folder,
        changed=changed or None,
    )


def _yaml(uri: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(read_text(uri))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # it is shown by its folder's name, and nothing else is known
    return found if isinstance(found, dict) else {}


def _events(uri: str) -> tuple[list[dict[str, Any]], float | None]:
    """(the last events of a metrics file, when it last changed); nothing of a file that is not there."""
    fs, path = filesystem(uri)
    try:
        size, changed = fs.size(path), _modified(fs, path)
        with fs.open(path, "rb") as file:
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return [], None
    events = []
    for line in lines[1 if size > _TAIL_BYTES else 0 :]:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut at the front, or still being written
        if isinstance(event, dict):
            events.append(event)
    return events, changed


def _modified(fs: Any, path: str) -> float | None:
    try:
        return fs.modified(path).timestamp()
    except (NotImplementedError, OSError):
        return None


# ---------------------------------------------------------------------------------------------------------------- jobs


def runs_of(job: Job) -> list[tuple[str, str]]:
    """(name, folder) of the runs that a job fills, as `ftray submit` wrote them down."""
    try:
        found = json.loads(job.metadata.get(FOLDERS) or "[]")
    except ValueError:
        return []
    return [(str(name), str(folder)) for name, folder in found]


def is_ours(job: Job) -> bool:
    """Submitted by `ftray submit`, or a job whose command is ftray's."""
    words = job.entrypoint.split()
    return COMMAND in job.metadata or any(w == "ftray" or w.endswith("/ftray") or w == "ftray.cli.main" for w in words)


def state_of(job: Job) -> str:
    if job.status == "STOPPED" or job.exit_code == EXIT_STOPPED:
        return "stopped"
    return {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "finished"}.get(job.status, "failed")


def of_job(job: Job) -> list[RunState]:
    """A line for each run of a job, or one for the job itself."""
    command = job.metadata.get(COMMAND) or " ".join(job.entrypoint.split())
    known = RunState(
        job.metadata.get(NAME) or job.id,
        state_of(job),
        command=_verb(command),
        job=job.id,
        changed=job.ended or job.started,
        exit_code=job.exit_code,
    )
    return [replace(known, name=name, folder=folder) for name, folder in runs_of(job)] or [known]


def _verb(command: str) -> str | None:
    """`train` of `ftray train run.yaml`."""
    words = command.split()
    for i, word in enumerate(words[:-1]):
        if word == "ftray" or word.endswith("/ftray") or word == "ftray.cli.main":
            return words[i + 1]
    return None


def merged(jobs: Iterable[Job], folders: Iterable[RunState], now: float | None = None) -> list[RunState]:
    """Every run once, those that moved last first. Where it stands is what its folder says; whether it runs is what its
    newest job says, unless somebody was at work in the folder since that job was over."""
    now = time.time() if now is None else now
    by_folder = {state.folder: state for state in folders}
    lines: list[RunState] = []
    told: set[str] = set()
    for job in jobs:  # the newest first
        for of_the_job in of_job(job):
            folder = of_the_job.folder
            if folder is None:
                lines.append(of_the_job)
            elif folder not in told:
                told.add(folder)
                lines.append(_with_folder(of_the_job, by_folder.get(folder), job, now))
    lines += [state for folder, state in by_folder.items() if folder not in told]
    return sorted(lines, key=lambda line: line.changed or 0, reverse=True)


_CLOCKS_SECONDS = 60.0
"""Clocks of two machines may differ by this much."""


def _with_folder(line: RunState, folder: RunState | None, job: Job, now: float) -> RunState:
    if folder is None or folder.unread:
        return replace(line, unread=folder.unread if folder else None)
    later = job.ended is not None and (
        (folder.changed or 0) > job.ended + _CLOCKS_SECONDS
        or (folder.state == "running" and now > job.ended + FRESH_SECONDS)  # a lease outlives a killed job for a while
    )
    state = folder.state if later else line.state
    changed = max(filter(None, (line.changed, folder.changed)), default=None)
    return replace(folder, state=state, command=line.command, job=line.job, changed=changed, exit_code=line.exit_code)


def find(name: str, jobs: Sequence[Job]) -> Job | None:
    """The newest job of this id, or that fills a run of this name or folder."""
    for job in jobs:
        if name in (job.id, job.metadata.get(NAME)) or any(name in (n, f.rstrip("/")) for n, f in runs_of(job)):
            return job
    return None
