"""Several users' runs on one base: each a lane of it, with its own data, steps, commits and artefact."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftray.config import Run
from ftray.data.prepare import prepare
from ftray.errors import ConfigError, FtrayError, RunError, RunStopped
from ftray.session import cause_of, usable_cpus
from ftray.train.launch import (
    check_cluster,
    gpus_of_a_worker,
    lead,
    preflight,
    tracked,
    worker_resources,
    write_summary,
)
from ftray.train.sharing import difference, refusal

_POLL_SECONDS = 0.2

Outcome = dict[str, Any] | FtrayError
"""The summary of a run, or why it has none."""
OnEvent = Callable[[str, dict[str, Any]], None]


def check_together(runs: Sequence[Run]) -> None:
    """What can be known before Ray starts. Raises ConfigError unless the runs can be lanes of one base, UserError for
    what is wrong with one of them."""
    for run in runs:
        if reason := refusal(run):
            raise ConfigError(
                f"{run.name} cannot share a base with others: {reason}",
                hint="train it by a command of its own; lanes are lora, dora, qlora and qdora with AdamW on one worker",
            )
        if key := difference(runs[0], run):
            raise ConfigError(
                f"{runs[0].name} and {run.name} need different bases: {key} differs",
                hint="train runs of one base together, the others by a command of their own",
            )
        preflight(run)
    for what, values in (("name", [run.name for run in runs]), ("folder", [run.folder for run in runs])):
        for value in values:
            if values.count(value) > 1:
                raise ConfigError(f"two runs have the {what} {value}", hint="give each a name and an output of its own")


def train_together(runs: Sequence[Run], *, on_event: OnEvent, stop: threading.Event) -> dict[str, Outcome]:
    """Train the runs, or go on with them, as lanes of one base; returns each one's outcome by its name. Needs a Ray
    session. `on_event` gets a run's name with each event; setting `stop` makes every run commit and end.

    A run for which there is no room in memory waits until others have ended. A run that fails fails alone. The process
    that holds the base is started again when it dies, as often as the run with the fewest `workers.retries` allows, and
    each run goes on from its last commit.
    """
    check_together(runs)
    with contextlib.ExitStack() as led:
        for run in runs:
            led.enter_context(lead(run, _named(on_event, run.name), stop))
        return _train_together(runs, on_event, stop)


def _train_together(runs: Sequence[Run], on_event: OnEvent, stop: threading.Event) -> dict[str, Outcome]:
    began = time.perf_counter()
    for run in runs:
        worker_resources(run)  # a host that asks for what is not there would wait for ever
        check_cluster(run, _named(on_event, run.name))
        prepare(run, _named(on_event, run.name))
        if stop.is_set():
            raise RunStopped("stopped before the first step", hint="the same command begins again")
    outcomes: dict[str, Outcome] = {}
    retries, started = min(run.workers.retries for run in runs), 0
    with contextlib.ExitStack() as trackers:
        tell = {run.name: trackers.enter_context(tracked(run, _named(on_event, run.name))) for run in runs}
        while left := [run for run in runs if run.name not in outcomes]:
            lost = _with_a_host(left, tell, stop, outcomes, began, restarts=started)
            started += 1
            if lost and 0 <= retries < started:
                for run in left:
                    error = RunError(
                        f"the process that holds the base was lost {started} times: {lost}",
                        where=run.folder,
                        hint="the last commit is whole: the same command goes on from it",
                    )
                    outcomes.setdefault(run.name, error)
    return outcomes


def _with_a_host(
    runs: Sequence[Run],
    tell: Mapping[str, Callable[[dict[str, Any]], None]],
    stop: threading.Event,
    outcomes: dict[str, Outcome],
    started: float,
    restarts: int,
) -> str | None:
    """Train `runs` on one host until each has an outcome; why the host was lost, if it was."""
    import ray
    from ray.exceptions import RayActorError

    with _host(runs[0]) as host:
        try:
            by_name = {run.name: run for run in runs}
            options = {"waits": False, "tells": True, "restarts": restarts}
            joined = {host.join.remote(run.name, run.dump(), **options): run.name for run in runs}
            waiting: dict[Any, str] = {}
            asked = False

            def pass_on(names: Sequence[str]) -> None:
                for name, events in zip(names, ray.get([host.events.remote(name) for name in names]), strict=True):
                    for event in events:
                        tell[name](event)

            while joined or waiting:
                done, _ = ray.wait([*joined, *waiting], num_returns=1, timeout=_POLL_SECONDS)
                left = [name for name in by_name if name not in outcomes]
                pass_on(left)
                if stop.is_set() and not asked:
                    ray.get([host.stop.remote(name) for name in left])
                    asked = True
                for reference in done:
                    is_here = reference in waiting
                    name = waiting.pop(reference) if is_here else joined.pop(reference)
                    try:
                        told = ray.get(reference)
                    except RayActorError:
                        raise
                    except Exception as raised:  # noqa: BLE001 - this run's alone
                        if is_here:
                            pass_on([name])
                        cause = cause_of(raised)
                        outcomes[name] = cause if isinstance(cause, FtrayError) else RunError(str(raised))
                        continue
                    if told is not None and told["kind"] == "end":
                        pass_on([name])
                        outcomes[name] = told["summary"]
                        write_summary(by_name[name], told["summary"], time.perf_counter() - started)
                    else:
                        waiting[host.next.remote(name)] = name
        except RayActorError as error:
            return str(error).strip().splitlines()[0]
    return None


@contextlib.contextmanager
def _host(run: Run) -> Iterator[Any]:
    """A host for one GPU, or for this machine's CPUs; it ends with the block."""
    import ray

    from ftray.tune.host import Host

    gpus = 1 if gpus_of_a_worker(run) else 0
    threads = int(run.workers.cpus or usable_cpus())
    # No CPUs are reserved on a local Ray, where nothing else runs: rows are still prepared there.
    actor: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0)(Host)
    host = actor.options(max_concurrency=1000).remote(threads, os.getcwd())
    try:
        yield host
    finally:
        ray.kill(host)


def _named(on_event: OnEvent, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda event: on_event(name, event)
