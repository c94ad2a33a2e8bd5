"""A search from its file to its best run: Ray Tune proposes, schedules and collects; lanes and runs do the work.

What a search goes on from is its ledger, never a snapshot of Tune's. Taken up again, every trial is proposed as it was,
reports what it reported, and only what was unfinished goes on, from its own commits.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import yaml

from ftray.config import Run
from ftray.config.search import Search
from ftray.errors import ConfigError, FtrayError, RunError, RunStopped
from ftray.manifest import filesystem, join, read_text, write_text
from ftray.session import ray_session, usable_cpus
from ftray.train.identity import differences
from ftray.train.lease import driving
from ftray.train.nodes import refuse_package, refuse_unshared, working_nodes
from ftray.tune.ledger import Ledger, Trial, changes_made
from ftray.tune.outcome import outcome, shown
from ftray.tune.plans import Kind, Planned, Plans
from ftray.tune.samplers import sampler_of
from ftray.tune.space import draw, how_many

Emit = Callable[[dict[str, Any]], None]

_FREE = ("samples", "budget", "concurrency", "retries", "lanes")
"""Keys of a search that change none of the trials it has."""
_MANY = 1000
"""Runs that take longer to check than anybody waits without a word."""
_TRIES = 32
"""Samples of a space that are checked before a search with Optuna starts."""
_RESTARTS = 8
"""Times that a worker which holds a base is started again."""
_CLOSE_SECONDS = 120.0
_MANY_STEPS = 10**6
_FREED_SECONDS = 3.0
_ROOM_SECONDS = 1.0
"""How long an answer about room in memory holds."""


def search(spec: Search, *, on_event: Emit, stop: threading.Event, verbose: bool = False) -> dict[str, Any]:
    """Make, or go on with, a search; returns its outcome, which is also SEARCH/outcome.json.

    `on_event` gets each event; setting `stop` lets all trials commit and leave. Raises RunStopped after
    such a stop, RunError when no trial came to anything or another process is at it, UserError for what the user can
    mend.
    """
    cache = (spec.raw_run().get("data") or {}).get("cache")
    refuse_package({"output": spec.folder, "data.cache": cache or spec.folder})
    with driving(spec.folder, lambda text: on_event({"kind": "status", "text": text}), stop, commanded=True):
        return _search(spec, on_event, stop, verbose)


def _search(spec: Search, on_event: Emit, stop: threading.Event, verbose: bool) -> dict[str, Any]:
    ledger = open_ledger(spec)
    hunt = Hunt(spec, ledger, on_event, stop)
    hunt.check_ahead()
    known = [shown(trial, spec) for trial in ledger.trials]
    on_event({"kind": "search", "total": hunt.total, "metric": spec.metric, "mode": spec.modes, "trials": known})
    with ray_session(verbose=verbose, cpus=local_cpus(spec)):
        if not hunt.is_over():
            refuse_unshared({"output": spec.folder})
            hunt.prepare_ahead()
            _tune(hunt, verbose)
    found = outcome(spec, ledger, budget_spent=hunt.budget_spent())
    write_text(join(spec.folder, "outcome.json"), json.dumps(found, indent=1) + "\n")
    if stop.is_set() and not hunt.is_over():
        raise RunStopped(
            f"stopped with {sum(t.state != 'open' for t in ledger.trials)} of {hunt.total} trials at their end;"
            " the others are committed",
            where=spec.folder,
            hint="the same command goes on",
        )
    if found["best"] is None:
        errors = [t.error for t in ledger.trials if t.error]
        raise RunError(
            f"no trial came to a value of {spec.metric[0]}"
            + (f"; the first of {len(errors)} errors:\n\n{errors[0]}\n" if errors else ""),
            where=spec.folder,
        )
    return found


def local_cpus(spec: Search) -> int:
    """Logical CPUs of a local Ray: those that this process may use, or more if a trial's workers need a place each."""
    counts = [(spec.raw_run().get("workers") or {}).get("count") or 1]
    if "workers.count" in spec.space:
        counts += spec.space["workers.count"].values or []
    return max(usable_cpus(), *counts) + spare_cpus(spec)


def spare_cpus(spec: Search) -> int:
    """CPUs that stay free for preparing rows while trials run: one, where it is not known beforehand which rows."""
    touched = any(key == "seed" or key.startswith(("data", "model")) for key in spec.space)
    return int(touched and spec.sampler.name == "optuna")


def open_ledger(spec: Search) -> Ledger:
    """The search's ledger. Raises ConfigError when the folder holds a search with another space or run."""
    ledger, place = Ledger(spec.folder), join(spec.folder, "search.yaml")
    if ledger.trials:
        before, now = yaml.safe_load(read_text(place)), spec.dump()
        for key in _FREE:
            before.pop(key, None)
            now.pop(key, None)
        if found := list(differences("", before, yaml.safe_load(yaml.safe_dump(now)))):
            raise ConfigError(
                "this folder holds a search with other settings:\n    " + "\n    ".join(found),
                where=spec.folder,
                hint="take the settings back to go on with it, or choose another `output` (or `name`)",
            )
    write_text(place, spec.to_yaml())
    return ledger


class Hunt:
    """What is decided about a search outside Ray Tune: which trial is next, how many at once, whether it is over."""

    def __init__(self, spec: Search, ledger: Ledger, on_event: Emit, stop: threading.Event) -> None:
        self.spec, self.ledger, self.on_event, self.stop = spec, ledger, on_event, stop
        self.total = how_many(spec)
        self.plans = Plans(spec, on_event)
        self.next = 0
        self.limit: Callable[[], int] = lambda: 1
        self.occupied: set[str] = set()
        """Tune's names of trials that have a place, or wait for one."""
        self.runs_alone = False
        """Trials that could be lanes are runs too: there is no room for both kinds at once."""
        self.ended = False
        """All trials have left, after they were asked to."""
        self._sampler = sampler_of(spec)
        self._planned: dict[int, Planned] = {}

    # ---------------------------------------------------------------------------------------------------- before Ray

    @property
    def _foreseen(self) -> bool:
        return self.spec.sampler.name != "optuna"

    def check_ahead(self) -> None:
        """Every run that the search will make, where that is known, or samples of what it might. Raises UserError."""
        recorded = [trial for trial in self.ledger.trials if trial.state == "open"]
        for trial in recorded:
            self._planned[trial.index] = self.plans.of(trial.parameters, trial.index)
        if self._foreseen:
            if (ahead := self.total - len(self.ledger.trials)) > _MANY:
                self.on_event({"kind": "status", "text": f"looking at {ahead:,} runs"})
            for index in range(len(self.ledger.trials), self.total):
                self._planned[index] = self.plans.of(self._sampler.propose(index, []), index)
        elif not recorded:
            for index in range(_TRIES):
                self.plans.of(draw(self.spec, index), index)

    def examples(self) -> list[Planned]:
        """Trials that will come, or might."""
        found = list(self._planned.values())
        return found if self._foreseen else [*found, *(self.plans.of(draw(self.spec, i), i) for i in range(_TRIES))]

    def kinds(self) -> set[Kind]:
        """Kinds of trials that may come."""
        return {"runs"} if self.runs_alone else {planned.kind for planned in self.examples()}

    def ordinary(self) -> list[Run]:
        """Trials that will be, or might be, runs by themselves: the one with the fewest workers first."""
        found = [planned.run for planned in self.examples() if self.runs_alone or planned.kind == "runs"]
        return sorted(found, key=lambda run: run.workers.most)

    def measure(self) -> tuple[int, int]:
        """(steps between evaluations, steps of the longest trial), as far as they are known before it begins."""
        runs = [planned.run for planned in self.examples()]
        here = [planned.run for planned in self._planned.values()]  # their rows are prepared
        known = [run.train.steps for run in runs if run.train.steps] + [self.plans.steps(run) for run in here]
        steps = max(known, default=_MANY_STEPS)
        return min(run.train.evaluate_every or steps for run in runs), steps

    def prepare_ahead(self) -> None:
        """The rows of every run that is known, and of one that might be: once trials hold all CPUs, none is left for
        this. Raises DataError, and RunStopped when asked to stop meanwhile."""
        ahead = list(self._planned.values())
        if not ahead:
            ahead.append(self.plans.of(draw(self.spec, 0), 0))
        for planned in ahead:
            self.plans.prepare(planned.run)
            if self.stop.is_set():
                raise RunStopped("stopped before the first trial", where=self.spec.folder, hint="the same command")

    # ------------------------------------------------------------------------------------------------- while it runs

    def budget_spent(self) -> bool:
        budget, trials = self.spec.budget, self.ledger.trials
        return (
            (budget.steps is not None and sum(t.step for t in trials) >= budget.steps)
            or (budget.target_tokens is not None and sum(t.trained_tokens for t in trials) >= budget.target_tokens)
            or (budget.minutes is not None and self.ledger.seconds >= 60 * budget.minutes)
        )

    def is_over(self) -> bool:
        """No trial is left, or the budget is spent."""
        trials = self.ledger.trials
        return (len(trials) >= self.total and all(t.state != "open" for t in trials)) or self.budget_spent()

    def ending(self) -> bool:
        return self.stop.is_set() or self.budget_spent()

    def suggest(self) -> dict[str, Any] | str | None:
        """The configuration of the next trial; None when there is no room now, "FINISHED" when there is none left."""
        if len(self.occupied) >= self.limit():
            return None
        while self.next < self.total and not self.ending():
            index, self.next = self.next, self.next + 1
            if index >= len(self.ledger.trials):
                self._propose(index)
            trial = self.ledger.trials[index]
            if trial.state == "aside" and not trial.results:
                continue
            return self._configuration(trial)
        return "FINISHED"

    def _propose(self, index: int) -> None:
        parameters = self._sampler.propose(index, self.ledger.trials)
        try:
            planned = self._planned.get(index) or self.plans.of(parameters, index)
        except FtrayError as error:
            self.ledger.write("trial", index=index, parameters=parameters, planned={})
            self.ledger.write("fail", index=index, error=str(error), aside=True)
            self.on_event({"kind": "trial_failed", "index": index, "error": str(error), "aside": True})
            return
        self._planned[index] = planned
        self.ledger.write("trial", index=index, parameters=parameters, planned=planned.facts)
        self.on_event({"kind": "trial", "index": index, "parameters": parameters})

    def _configuration(self, trial: Trial) -> dict[str, Any]:
        steps, kind = 0, "runs"
        if trial.state == "open":
            planned = self._planned[trial.index]
            self.plans.prepare(planned.run)
            steps, kind = self.plans.steps(planned.run), "runs" if self.runs_alone else planned.kind
            if trial.steps is None:
                self.ledger.write("begin", index=trial.index, steps=steps)
            self.on_event({"kind": "trial_started", "index": trial.index, "steps": steps, "step": trial.step})
        return {
            "index": trial.index,
            "parameters": dict(trial.parameters),
            "kind": kind,
            "steps": steps,
            "failures": trial.failures,
            "ended": trial.state,
            "replay": json.dumps(trial.results),
            "changes": len(trial.changes),
            "source": self._source(trial),
        }

    def _source(self, trial: Trial) -> str | None:
        """Where a trial must take its weights from that population based training changed, when the search was broken
        off before it could."""
        from ftray.train import commits

        if trial.state != "open" or changes_made(self.spec.trial_folder(trial.index)) >= len(trial.changes):
            return None
        change = trial.changes[-1]
        folder = self.spec.trial_folder(change["source"])
        steps = commits.steps_of(folder)
        step = change["source_step"] if change["source_step"] in steps else max(steps, default=None)
        return None if step is None else commits.place_of(folder, step)

    def finished(self, index: int, summary: dict[str, Any]) -> None:
        """Leave in the trial's folder what a run leaves."""
        place = join(self.spec.trial_folder(index), "summary.json")
        fs, path = filesystem(place)
        if summary and not fs.exists(path):
            write_text(place, json.dumps(summary, indent=2))


# ---------------------------------------------------------------------------------------------------------- on Ray Tune


def _tune(hunt: Hunt, verbose: bool) -> None:
    import ray

    for name, value in _QUIET_TUNE.items():
        os.environ.setdefault(name, value)
    from ray import tune

    from ftray.tune.proposals import Ending, Proposals, Watch
    from ftray.tune.schedulers import Recorded, scheduler_of
    from ftray.tune.trial import Follower

    spec = hunt.spec
    with _seats(hunt, verbose) as desk, tempfile.TemporaryDirectory(prefix="ftray-tune-") as scratch:
        hunt.limit = _limit(hunt, desk)
        inner = scheduler_of(spec, *hunt.measure())

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "trial_finished":
                hunt.finished(event["index"], event["summary"])
            hunt.on_event(event)

        here = ray.util.get_node_ip_address()
        places = tune.PlacementGroupFactory([{f"node:{here}": 0.0001}])
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Follower, search=spec, desk=desk), places),
            tune_config=tune.TuneConfig(
                search_alg=Proposals(hunt),
                scheduler=Recorded(inner, spec, hunt.ledger, on_event),
                num_samples=-1,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                failure_config=tune.FailureConfig(max_failures=_RESTARTS),
                stop=Ending(hunt),
                callbacks=[Watch(hunt, desk)],
                verbose=0,
            ),
        )
        try:
            with ThreadPoolExecutor(1) as pool:  # on the main thread it would take Ctrl-C over
                pool.submit(tuner.fit).result()
        except FtrayError:
            raise
        except Exception as error:
            hint = "every trial's last commit is whole: the same command goes on"
            raise RunError(f"Ray Tune gave up: {error}", where=spec.folder, hint=hint) from error


_QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_WARN_THRESHOLD_S": "1000000",
}


@contextmanager
def _seats(hunt: Hunt, verbose: bool) -> Iterator[Any]:
    """The desk, with the workers behind it that the search needs; all of them end with the block."""
    import ray
    from ray.exceptions import RayError

    from ftray.tune.desk import Desk

    seats, free = dict[str, list[Any]](), _free()
    free["CPU"] -= spare_cpus(hunt.spec)
    for_runs, for_lanes = _shares(hunt, free)
    try:
        if for_runs:
            seats["runs"] = [_ordinary(hunt.ordinary(), for_runs, verbose)]
        if for_lanes:
            seats["lanes"] = _hosts(for_lanes)
        desk = _actor(Desk, num_cpus=0).remote(seats, hunt.spec.scheduler.name != "fifo")
        try:
            yield desk
        finally:
            with suppress(RayError):  # a run that is killed in mid-step would leave temporary folders behind
                ray.get(desk.close.remote(), timeout=_CLOSE_SECONDS)
            ray.kill(desk)
    finally:
        for handle in (handle for handles in seats.values() for handle in handles):
            ray.kill(handle)


def _free() -> dict[str, float]:
    """CPUs and GPUs that no other job holds. Those of work that has just ended come back within moments."""
    import ray

    end = time.monotonic() + _FREED_SECONDS
    while True:
        cluster, free = ray.cluster_resources(), ray.available_resources()
        found = {name: free.get(name, 0.0) for name in ("CPU", "GPU")}
        if time.monotonic() > end or all(found[name] >= cluster.get(name, 0.0) for name in found):
            return found
        time.sleep(0.1)


def _shares(hunt: Hunt, free: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """(resources for ordinary runs, resources for lanes). Where there are both, one run at a time has its places; if
    that would leave lanes nothing, all trials are runs."""
    from ftray.tune.ordinary import places_of

    kinds = hunt.kinds()
    if kinds == {"lanes"}:
        return {}, free
    if kinds == {"runs"}:
        return free, {}
    need = places_of(hunt.ordinary()[-1])
    left = {name: have - need.get(name, 0) for name, have in free.items()}
    if left["CPU"] < 1 or (free["GPU"] and left["GPU"] < 1):
        hunt.runs_alone = True
        return free, {}
    return need, left


def _ordinary(runs: list[Run], free: dict[str, float], verbose: bool) -> Any:
    """The actor that starts ordinary runs like these, the largest last. Raises RunError when that would never fit."""
    from ftray.tune.ordinary import Ordinary, fits, places_of

    run, need = runs[-1], places_of(runs[-1])
    if not fits(need, free):
        wants = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        have = " and ".join(f"{amount:g} {name}" for name, amount in free.items())
        raise RunError(
            f"a trial's {run.workers.most} workers take {wants}; for trials there are {have}",
            where="workers",
            hint="lower workers.count, or what each worker asks for",
        )
    return _actor(Ordinary, num_cpus=0, max_restarts=_RESTARTS).remote(os.getcwd(), free, places_of(runs[0]), verbose)


def _hosts(free: dict[str, float]) -> list[Any]:
    """Workers that hold a base: one for each GPU that is free, else one a node with its free CPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from ftray.tune.host import Host

    def start(node: str, cpus: float, gpus: float) -> Any:
        place = NodeAffinitySchedulingStrategy(node, soft=True)  # it starts elsewhere if its node is lost
        host = _actor(Host, num_cpus=cpus, num_gpus=gpus, max_restarts=_RESTARTS, scheduling_strategy=place)
        return host.remote(max(1, int(cpus)), os.getcwd())

    found: list[Any] = []
    for node, cpus, gpus in divided(_free_of_nodes(), free):
        each = max(1.0, cpus // gpus) if gpus else cpus
        found += [start(node, each, float(bool(gpus))) for _ in range(gpus or 1)]
    if not found:
        hint = "other jobs hold them: wait for these, or add nodes"
        raise RunError("no node has a free CPU for trials", where="cluster", hint=hint)
    return found


def _free_of_nodes() -> dict[str, dict[str, float]]:
    """What each living node has that no other job holds, by its id."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return {node["NodeID"]: free.get(node["NodeID"], {}) for node in working_nodes()}


def divided(nodes: dict[str, dict[str, float]], free: dict[str, float]) -> list[tuple[str, float, int]]:
    """(node, CPUs, GPUs) for workers that hold a base: what the nodes have, no more than `free` in all, the largest
    first. Where there are GPUs, nodes without take no part; a node takes part with one CPU at least."""
    cpus, gpus, found = free["CPU"], int(free["GPU"]), list[tuple[str, float, int]]()
    with_gpus = gpus > 0
    for node, has in sorted(
        nodes.items(), key=lambda item: (item[1].get("GPU", 0), item[1].get("CPU", 0)), reverse=True
    ):
        own_cpus, own_gpus = min(cpus, has.get("CPU", 0.0)), min(gpus, int(has.get("GPU", 0)))
        if own_cpus < 1 or (with_gpus and not own_gpus):
            continue
        own_gpus = min(own_gpus, int(own_cpus))  # each needs a CPU
        found.append((node, own_cpus, own_gpus))
        cpus, gpus = cpus - own_cpus, gpus - own_gpus
    return found


def _actor(kind: type, **options: Any) -> Any:
    """A class of async Ray actors that answer many calls at once."""
    import ray

    remote: Any = ray.remote
    return remote(max_concurrency=1000, **options)(kind)


def _limit(hunt: Hunt, desk: Any) -> Callable[[], int]:
    """How many trials at once: as the search file says, or what the workers have room for by now."""
    import ray

    if hunt.spec.concurrency != "auto":
        number = hunt.spec.concurrency
        return lambda: number
    kinds, known, asked_at = sorted(hunt.kinds()), 1, float("-inf")

    def limit() -> int:
        nonlocal known, asked_at
        if time.monotonic() - asked_at > _ROOM_SECONDS:
            known = sum(ray.get([desk.room.remote(kind) for kind in kinds]))
            asked_at = time.monotonic()
        return known

    return limit
