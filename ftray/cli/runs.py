"""`ftray runs`: the runs of a cluster and of folders; one of them; its log; its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence

from ftray.cli.words import count, duration, facts, json_text, table
from ftray.errors import EXIT_OK, EXIT_STOPPED, DataError, FtrayError, RunError, UserError
from ftray.jobs.cluster import Cluster, ConnectionLost, Job
from ftray.jobs.listing import RunState, find, folders_in, is_ours, look, merged, of_job, runs_of, unread
from ftray.jobs.outcome import outcome
from ftray.redact import redact
from ftray.storage import reached
from ftray.train.lease import holders

_EVERY_SECONDS = 1.0


def list_command(
    folders: Sequence[str], *, address: str | None, token_file: str | None, every: bool, as_json: bool
) -> None:
    """Runs of the cluster's jobs, and of folders; of folders alone where no cluster is named."""
    jobs = _jobs(address, token_file, needed=not folders)
    states = _states(folder for place in folders for folder in folders_in(place))
    states += [state for state in _of_jobs(jobs) if state.folder not in {s.folder for s in states}]
    lines = merged(jobs, states)
    if not every:
        lines = lines[:_SHOWN]
    if as_json:
        print(json_text([line.to_json() for line in lines], indent=2))
    elif lines:
        print(runs_table(lines))
        if told := unread_text(lines):
            print(f"\n{told}")
    else:
        print("no runs", file=sys.stderr)


_SHOWN = 40


def _jobs(address: str | None, token_file: str | None, needed: bool) -> list[Job]:
    """ftray's jobs, the newest first; none where no cluster is named and none is needed."""
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "").startswith("http")
    if not named and not needed:
        return []
    return [job for job in Cluster.open(address, token_file).jobs() if is_ours(job)]


def _of_jobs(jobs: Sequence[Job]) -> list[RunState]:
    """What the folders of jobs say; nothing of those that are paths of the cluster's alone."""
    return _states(dict.fromkeys(folder for job in jobs for _, folder in runs_of(job)))


def _states(folders: Iterable[str]) -> list[RunState]:
    """What each folder says, or why it cannot be read from here. A store that failed is asked no more: each time might
    take minutes."""
    found: list[RunState | None] = []
    failed: dict[str, str] = {}
    for folder in folders:
        store = _store(folder)
        if store in failed:
            found.append(unread(folder, failed[store]))
            continue
        try:
            found.append(_look(folder))
        except FtrayError as error:
            found.append(unread(folder, error.what))
            if isinstance(error, RunError) and not isinstance(error.__cause__, PermissionError):
                failed[store] = error.what  # a permission may be missing for one folder alone
    return [state for state in found if state is not None]


def _store(folder: str) -> str:
    """`s3://bucket`; of a plain path itself."""
    return "/".join(folder.split("/")[:3]) if "://" in folder else folder


def _look(folder: str) -> RunState | None:
    """What a folder says, if it is a run's. Raises FtrayError where it cannot be read."""
    try:
        with reached(folder):
            return look(folder, _held)
    except FtrayError:
        raise
    except Exception as error:  # drivers raise errors of their own libraries
        text = " ".join(redact(str(error)).split())[:200]
        raise DataError(f"{type(error).__name__}: {text}", where=redact(folder)) from error


def _held(folder: str) -> bool:
    return any(holder.alive for holder in holders(folder))


def runs_table(lines: Sequence[RunState], now: float | None = None) -> str:
    now = time.time() if now is None else now
    rows = [
        (
            line.name,
            line.state if line.exit_code in (None, 0, EXIT_STOPPED) else f"{line.state} ({line.exit_code})",
            line.command or "",
            progress(line),
            _loss(line),
            "" if line.changed is None else f"{duration(max(0.0, now - line.changed))} ago",
            line.job or "",
            line.folder or "",
        )
        for line in lines
    ]
    head = ("run", "state", "command", "step", "loss", "moved", "job", "folder")
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    return table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def unread_text(lines: Iterable[RunState]) -> str:
    """Why steps and losses of some are not known: a line for each reason."""
    folders: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.unread:
            folders.setdefault((line.unread, _store(line.folder or "")), []).append(redact(line.folder or ""))
    return "\n".join(
        f"? {first}{f' and {len(more)} more there' if more else ''} cannot be read from here: {why}"
        for (why, _), (first, *more) in folders.items()
    )


def progress(line: RunState) -> str:
    if line.step is None:
        return "?" if line.unread else ""
    return count(line.step) + (f"/{count(line.of)}" if line.of else "")


def _loss(line: RunState) -> str:
    parts = [] if line.loss is None else [f"{line.loss:.4f}"]
    return " ".join(parts + ([] if line.held_out is None else [f"(held-out {line.held_out:.4f})"]))


def show_command(run: str, *, address: str | None, token_file: str | None, as_json: bool) -> None:
    """One run: by its file, its folder, its name or its job's id."""
    state, job = _one(run, address, token_file)
    if as_json:
        told = None if job is None else {"id": job.id, "status": job.status, "entrypoint": job.entrypoint}
        print(json_text(state.to_json() | {"of_job": told}, indent=2))
        return
    pairs = [("run", state.name), ("state", state.state)]
    if text := progress(state):
        pairs.append(("step", text))
    if text := _loss(state):
        pairs.append(("loss", text))
    if state.changed is not None:
        pairs.append(("moved", f"{duration(max(0.0, time.time() - state.changed))} ago"))
    if state.folder:
        pairs.append(("folder", state.folder))
    if state.unread:
        pairs.append(("not read", state.unread))
    if job is not None:
        pairs += [("job", f"{job.id}, {job.status}"), ("command", job.entrypoint)]
        if job.is_over and job.status != "SUCCEEDED":
            pairs.append(("ended", outcome(job).text))
    print(facts(pairs, indent=0))


def _one(run: str, address: str | None, token_file: str | None) -> tuple[RunState, Job | None]:
    """Raises UserError where neither a folder nor a job is meant."""
    names = _names(run)
    state, failure = None, None
    folder = next((name for name in names if "://" in name or os.path.isdir(name)), None)
    if folder is not None:
        try:
            state = _look(folder)
        except FtrayError as error:
            state, failure = unread(folder, error.what), error
        if state is None and names == [folder]:
            raise UserError("this folder holds no run", where=run)
    jobs = _jobs(address, token_file, needed=state is None)
    job = _found(names, jobs)
    if job is None and failure is not None:
        raise failure
    if state is None and job is None:
        raise _no_run(run, jobs)
    if job is None:
        assert state is not None
        return state, None
    folders = [state] if state else _of_jobs([job])
    lines = merged([job], folders)
    return next((line for line in lines if line.name in names or line.folder in names), lines[0]), job


def _names(run: str) -> list[str]:
    """What a run is known by, the surest first: what was given, or of a run's or search's file the folder and the name
    that it gives. Raises ConfigError for a file that is neither."""
    if not run.endswith((".yaml", ".yml")) or not ("://" in run or os.path.isfile(run)):
        return [run.rstrip("/")]
    from ftray.config import load_run
    from ftray.config.reading import load_raw
    from ftray.config.search import load_search

    found = load_search(run) if "space" in load_raw(run)[0] else load_run(run)
    return [found.folder.rstrip("/"), found.name]


def _found(names: Sequence[str], jobs: Sequence[Job]) -> Job | None:
    return next((job for name in names if (job := find(name, jobs))), None)


def _no_run(run: str, jobs: Sequence[Job]) -> UserError:
    names = dict.fromkeys(line.name for job in jobs for line in of_job(job))
    return UserError(
        "no such run or job on this cluster, and no such folder",
        where=run,
        hint=f"runs: {', '.join(list(names)[:12])}" if names else "the cluster knows no job of ftray's",
    )


def _job(run: str, cluster: Cluster) -> Job:
    jobs = [job for job in cluster.jobs() if is_ours(job)]
    job = _found(_names(run), jobs)
    if job is None:
        raise _no_run(run, jobs)
    return job


def logs_command(
    run: str, *, address: str | None, token_file: str | None, follow: bool, as_json: bool, verbose: bool
) -> int:
    """Print a job's log; with `follow` until it is over, and return its exit code."""
    from ftray.cli.submit import follow as follow_job
    from ftray.jobs.follow import OwnLines

    cluster = Cluster.open(address, token_file)
    job = _job(run, cluster)
    if follow:
        return follow_job(cluster, job.id, as_json=as_json, verbose=verbose)
    own = OwnLines()
    text = cluster.logs(job.id)
    print(text if verbose else own(text) + own.end(), end="")
    return EXIT_OK


def stop_command(run: str, *, address: str | None, token_file: str | None, wait: bool, as_json: bool) -> int:
    """Ask a job to commit and end, and tell when it has."""
    cluster = Cluster.open(address, token_file)
    job = _job(run, cluster)

    def say(text: str) -> None:
        print(json_text({"kind": "status", "job": job.id, "text": text}) if as_json else text, flush=True)

    if job.is_over:
        say(f"it is over already: {outcome(job).text}")
        return EXIT_OK
    cluster.stop(job.id)
    say(f"asked {job.id} to commit and end" + ("" if wait else "; `ftray runs list` tells when it has"))
    if not wait:
        return EXIT_OK
    while not job.is_over:
        time.sleep(_EVERY_SECONDS)
        try:
            job = cluster.job(job.id)
        except ConnectionLost as lost:
            say(lost.what)
    last = _last_words(cluster, job)
    say(f"{job.id} has ended: {last}" if last else f"{job.id} has ended")
    return EXIT_OK


def _last_words(cluster: Cluster, job: Job) -> str:
    """What the run said when it stopped, or that it said nothing."""
    lines = cluster.logs(job.id).splitlines()
    told = [line.strip() for line in lines if "stopped at step" in line or "stopped before" in line]
    if told:
        return told[-1]
    states = _of_jobs([job])
    steps = ", ".join(f"{state.name} at step {progress(state)}" for state in states if state.step is not None)
    return f"it said no last word{f' ({steps})' if steps else ''}; the same command goes on from its last commit"
