"""Start a run on Ray: prepare its rows, then the loop on Ray Train workers.

Ray Train places a group of workers and tells when one of them is lost; whether and how large the next group is, is
decided here. What a run goes on from are its own commits: Ray's checkpoints and the controller's snapshot are not used,
so nothing of theirs can keep a run from starting again.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from ftray.config import Run
from ftray.data.prepare import make_plan, prepare
from ftray.errors import ConfigError, FtrayError, ModelError, RunError, RunStopped
from ftray.manifest import join, write_text
from ftray.model.shapes import Shapes
from ftray.session import cause_of, in_a_job, in_the_users_process, ray_session, stand_aside, usable_cpus
from ftray.train import commits, native, nodes
from ftray.train.board import Board, BoardChannel
from ftray.train.identity import identity, refuse_other_run
from ftray.train.lease import driving, refuse_driver
from ftray.train.places import refuse_guessed_cpus, wait_for_places
from ftray.train.watch import Retries, Watch, end_all, wait_out

Emit = Callable[[dict[str, Any]], None]
_POLL_SECONDS = 0.2
_FINAL = (TypeError, AttributeError, NameError, KeyError, ValueError, AssertionError, NotImplementedError, ImportError)
"""Errors of the program, which come again however often a group of workers is started."""


def train(
    run: Run,
    *,
    on_event: Emit,
    stop: threading.Event,
    verbose: bool = False,
    released: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Run, or go on with, `run`; returns the summary, which is also RUN/summary.json.

    `on_event` gets each event in this thread's process; setting `stop` makes the run commit and end. With `released`
    the workers stand still after each evaluation until it returns a step that is not below that of the evaluation, or
    the run is stopped. Raises RunStopped after such a stop, RunError when the run could not go on, UserError for what
    the user can mend.
    """
    started = time.perf_counter()
    preflight(run)
    with ExitStack() as session:
        session.enter_context(ray_session(verbose=verbose, cpus=local_cpus(run)))
        worker_resources(run)
        _refuse_on_nodes(run)
        session.enter_context(lead(run, on_event, stop))
        if committed := commits.newest_identity(run.folder):
            refuse_other_run(committed, identity(run, make_plan(run).digest), run.folder)
        write_text(join(run.folder, "run.yaml"), run.to_yaml())
        check_cluster(run, on_event)
        data_uri = prepare(run, _until(stop, on_event, run.folder))
        _compile_on_nodes(run, on_event)
        _until(stop, on_event, run.folder)({"kind": "status", "text": f"starting {workers_in_words(run)}"})
        with tracked(run, on_event) as tell:
            summary = _fit(run, data_uri, tell, stop, verbose, released)
    write_summary(run, summary, time.perf_counter() - started)
    if summary["reason"] == "stopped":
        raise RunStopped(
            f"stopped at step {summary['steps']:,}, which is committed",
            where=run.folder,
            hint="the same command goes on",
        )
    return summary


def write_summary(run: Run, summary: dict[str, Any], seconds: float) -> None:
    """RUN/summary.json, with the seconds that it took from the command on."""
    import orjson

    summary["wall_seconds"] = seconds
    write_text(join(run.folder, "summary.json"), orjson.dumps(summary, option=orjson.OPT_INDENT_2).decode())


def preflight(run: Run) -> None:
    """What can be known before Ray starts. Raises UserError where the method does not fit the base, where what the run
    leaves would go with its job, or where this machine, if it is the one that trains, lacks what offload needs;
    RunError where another process of it leads this run."""
    from ftray.model.plan import make_plan as make_memory_plan

    nodes.refuse_package(nodes.folders_of(run))
    refuse_driver(run.folder)
    if (shapes := _shapes(run)) is not None:
        make_memory_plan(run, shapes)
    if not in_a_job():
        native.refuse_nvme(run)


def _shapes(run: Run) -> Shapes | None:
    """Of the base; None where its config.json is not at hand here: the workers will see."""
    from ftray.model.source import find_shapes

    try:
        return find_shapes(run.model)[0]
    except ModelError:
        return None


def check_cluster(run: Run, on_event: Emit) -> None:
    """What can be known once Ray is there. Raises ConfigError where the workers would be without GPUs by a guess,
    RunError where the nodes do not see the same files."""
    import ray

    if in_a_job() and in_the_users_process():
        shapes = _shapes(run)
        parameters = shapes.parameters if shapes else None
        if warning := refuse_guessed_cpus(run.workers.gpus, ray.cluster_resources(), parameters):
            on_event({"kind": "warning", "text": warning})
    nodes.refuse_unshared(nodes.folders_of(run))


def lead(run: Run, on_event: Emit, stop: threading.Event) -> AbstractContextManager[None]:
    """Be the one that leads `run`; see `ftray.train.lease`. Needs a Ray session."""
    return driving(
        run.folder, lambda text: on_event({"kind": "status", "text": text}), stop, commanded=in_the_users_process()
    )


def _until(stop: threading.Event, on_event: Emit, folder: str) -> Emit:
    """`on_event` that raises RunStopped once `stop` is set."""

    def told(event: dict[str, Any]) -> None:
        on_event(event)
        if stop.is_set():
            raise RunStopped("stopped before the first step", where=folder, hint="the same command begins again")

    return told


def workers_in_words(run: Run) -> str:
    return f"{run.workers.number} Ray Train worker{'s' if run.workers.most > 1 else ''}"


def local_cpus(run: Run) -> int:
    """Logical CPUs of a local Ray: those that this process may use, or more if the workers need a place each."""
    return max(usable_cpus(), run.workers.most)


def _refuse_on_nodes(run: Run) -> None:
    """Raises ConfigError where a machine lacks what offload takes: tools to compile, a place for what goes to NVMe."""
    if names := native.parts(run):
        nodes.on_each(_nodes_of_workers(run), native.refuse_nvme, run)
        nodes.on_each(_nodes_of_workers(run), native.refuse_without_tools, names)


def _compile_on_nodes(run: Run, on_event: Emit) -> None:
    """Compile what offload needs of DeepSpeed, once on each machine, before workers wait for it. Raises RunError, and
    ConfigError where a machine that came meanwhile lacks what it takes."""
    names = native.parts(run)
    if not names:
        return
    _refuse_on_nodes(run)
    here = _nodes_of_workers(run)
    if any(nodes.on_each(here, native.missing, names)):
        on_event({"kind": "status", "text": _COMPILING[names[-1]]})
        nodes.on_each(here, native.compile_parts, names)


def _nodes_of_workers(run: Run) -> list[dict[str, Any]]:
    """Those that workers may be placed on."""
    here = nodes.working_nodes()
    return [node for node in here if node["Resources"].get("GPU")] if gpus_of_a_worker(run) else here


_COMPILING = {
    "cpu_adam": "compiling DeepSpeed's CPU Adam, about 90 s, once a machine",
    "async_io": "compiling DeepSpeed's CPU Adam and NVMe access, about 5 minutes, once a machine",
}


# ------------------------------------------------------------------------------------------------------------- workers


def _fit(
    run: Run,
    data_uri: str,
    on_event: Emit,
    stop: threading.Event,
    verbose: bool,
    released: Callable[[], int] | None = None,
) -> dict[str, Any]:
    """Groups of workers, one after the other, until the run is at its end."""
    import ray

    board: Any = _beside_us(Board).remote()
    resources, use_gpu = worker_resources(run)
    config = {"run": run.dump(), "data": data_uri, "board": board, "threads": int(resources["CPU"])}
    config |= {"folder": os.getcwd(), "waits": released is not None}
    tell = _Told(on_event)
    retries, restarts, seen = Retries(run.workers.retries), 0, set[str]()
    waits_until = time.monotonic() + run.workers.wait_seconds
    with _relay(board, tell, stop, released or (lambda: 0)), _silent(not verbose):
        for group in itertools.count():
            size = wait_for_places(
                resources,
                run.workers.least,
                run.workers.most,
                seconds=waits_until - time.monotonic(),
                limit=run.workers.wait_seconds,
                stop=stop,
                folder=run.folder,
                tell=tell.status,
            )
            nodes.refuse_unshared(nodes.folders_of(run), seen)  # they may have come a moment ago
            ray.get(board.open.remote(group))
            with Watch(board, run, resources, size, tell) as watch:
                told = config | {"group": group, "restarts": restarts}
                failure = _fit_group(run, told, size, resources, use_gpu)
            outcome = ray.get(board.outcome.remote())
            if outcome["error"] is not None:
                raise outcome["error"]
            summary = outcome["summary"]
            if summary is not None and (stop.is_set() or summary["reason"] != "stopped"):
                return summary
            members, restarts = ray.get(board.close.remote()), 0
            if summary is None:
                left = end_all(members)
                if stop.is_set():
                    raise _stopped(run)
                before = getattr(failure, "controller_failure", None)
                if before is not None and isinstance(cause := cause_of(before), FtrayError):
                    raise cause  # what stops a group before its loop begins stops the next one too
                if not _may_start_again(run, failure, retries, waits_until):
                    raise _cause(failure, watch.causes + outcome["crashes"], run)
                tell.status(watch.account(failure))
                wait_out(lambda: ray.get(board.lives.remote()), left, stop, tell.status)
                if stop.is_set():
                    raise _stopped(run)
                restarts = retries.used
            if members:  # the wait that is limited is that of a run that stands still
                waits_until = time.monotonic() + run.workers.wait_seconds
    raise AssertionError


def _stopped(run: Run) -> RunStopped:
    return RunStopped(
        "stopped while its workers were being started again", where=run.folder, hint="the same command goes on"
    )


def _beside_us(actor: type) -> Any:
    """An actor class that lives on this process's node: workers' nodes come and go."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    made: Any = ray.remote(num_cpus=0, max_restarts=0)(actor)  # type: ignore[attr-defined]
    return made.options(scheduling_strategy=here)


def _fit_group(
    run: Run, config: dict[str, Any], size: int, resources: dict[str, float], use_gpu: bool
) -> Exception | None:
    """One group of workers, from its start to its end; what Ray Train says went wrong."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ftray.train.group import GroupConfig

    with tempfile.TemporaryDirectory(prefix="ftray-ray-") as scratch:
        trainer = TorchTrainer(
            _worker_main,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=size, use_gpu=use_gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=f"{run.name}-{uuid.uuid4().hex[:8]}",
                storage_path=scratch,
                # every failure comes back here, where nodes, places and commits are known
                failure_config=FailureConfig(**_FAILURES),
            ),
            torch_config=GroupConfig(
                backend="nccl" if use_gpu else "gloo",
                timeout_s=math.ceil(run.workers.stall_seconds + 60),
                board=config["board"],
                group=config["group"],
            ),
        )
        try:
            with ThreadPoolExecutor(1) as pool:  # on the main thread it would take Ctrl-C over, and abort
                pool.submit(trainer.fit).result()
        except Exception as error:  # noqa: BLE001 - what Ray raises has many types; the board knows the cause
            return error
    return None


_FAILURES: dict[str, Any] = {"max_failures": 0, "controller_failure_limit": 0, "max_preemption_failures": 0}
"""What Ray Train would try again by itself, with as many workers as before."""


def _no_places(failure: Exception | None) -> bool:
    """Whether a group did not start because its places were gone again."""
    return "StartupTimeout" in type(getattr(failure, "controller_failure", None)).__name__


def _may_start_again(run: Run, failure: Exception | None, retries: Retries, waits_until: float) -> bool:
    """Whether another group may follow one that failed. That its places were gone counts as a failure only once the
    time for waiting has passed: places may look free, and never be."""
    if _no_places(failure) and time.monotonic() < waits_until:
        return True
    return retries.another(commits.steps_of(run.folder)[-1:])


def worker_resources(run: Run) -> tuple[dict[str, float], bool]:
    """(resources of one worker, whether it has GPUs), from the run file and what the cluster has. Raises ConfigError
    where that can never be enough."""
    import ray

    cluster = ray.cluster_resources()
    gpus = gpus_of_a_worker(run)
    cpus = run.workers.cpus
    if cpus is None:
        one_machine = len([n for n in ray.nodes() if n["Alive"]]) == 1
        cpus = max(1, int(cluster.get("CPU", 1)) // run.workers.most) if one_machine and not gpus else 1
    resources: dict[str, float] = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    for name, each in resources.items() if not in_a_job() else []:  # to a cluster, nodes may come yet
        have, least = cluster.get(name, 0), run.workers.least
        if each * least > have:
            workers = f"{least} worker{'s' if least > 1 else ''}"
            raise ConfigError(
                f"{workers} × {each:g} {name} = {each * least:g}, the cluster has {have:g}",
                where="workers",
                hint=f"lower workers.{'min' if run.workers.elastic else 'count'}, or what each worker asks for",
            )
    return resources, gpus > 0


def gpus_of_a_worker(run: Run) -> float:
    import ray

    if run.workers.gpus == "auto":
        return 1 if ray.cluster_resources().get("GPU", 0) else 0
    return run.workers.gpus


def _worker_main(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Errors that a restart cannot mend go to the board and end the run; others go
    to Ray Train, which ends the group."""
    import ray.train
    import ray.train.torch
    import torch

    from ftray.data.prepared import PreparedData
    from ftray.train.loop import train_worker
    from ftray.train.world import World

    context = ray.train.get_context()
    channel = BoardChannel(config["board"], context.get_world_rank(), group=config["group"], waits=config["waits"])
    world = World(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device(), channel.mark)
    torch.set_num_threads(max(1, config["threads"]))
    if os.path.isdir(config["folder"]):  # Ray Train moves its workers; a run file means the user's folder
        os.chdir(config["folder"])
    if not channel.join():
        return
    restarts = config["restarts"]
    try:
        run, data = Run.model_validate(config["run"]), PreparedData.open(config["data"])
        summary = train_worker(run, data, world, channel, restarts=restarts)
    except FtrayError as error:
        if not channel.fail(error, world.size):
            raise
    except _FINAL as error:
        if not channel.fail(RunError(f"a worker failed: {error}\n\n{traceback.format_exc()}"), world.size):
            raise
    except BaseException:
        channel.crash(traceback.format_exc())
        raise
    else:
        channel.finish(summary if world.is_first else None)


# -------------------------------------------------------------------------------------------------------------- driver


class _Told:
    """`on_event`, without the ends of groups that are followed by others."""

    def __init__(self, on_event: Emit) -> None:
        self._on_event, self._lock = on_event, threading.Lock()
        self.moving = False

    def __call__(self, event: dict[str, Any]) -> None:
        if not (self.moving and event["kind"] == "end" and event["reason"] == "stopped"):
            with self._lock:
                self._on_event(event)

    def status(self, text: str) -> None:
        self({"kind": "status", "text": text})


@contextmanager
def _relay(board: Any, on_event: Emit, stop: threading.Event, released: Callable[[], int]) -> Iterator[None]:
    """Hand the board's events to `on_event`, and the wish to stop, or leave to go on, to the board, until the block
    ends."""
    import ray

    done = threading.Event()

    def relay() -> None:
        while True:
            last = done.wait(_POLL_SECONDS)
            for event in ray.get(board.drain.remote(stop.is_set(), released())):
                try:
                    on_event(event)
                except OSError:  # nobody reads any more: commit and end
                    stop.set()
            if last:
                return

    thread = threading.Thread(target=relay, name="ftray-relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=30)


@contextmanager
def tracked(run: Run, on_event: Emit) -> Iterator[Emit]:
    """`on_event` that also feeds the trackers of `run.logging`. A group of workers that starts again goes on in them
    from the step of its commit."""
    from ftray.train.sinks import Sinks

    sinks: Sinks | None = None

    def event_and_trackers(event: dict[str, Any]) -> None:
        nonlocal sinks
        on_event(event)
        if event["kind"] == "start":
            stand_aside()
            if sinks:
                sinks.close()
            sinks = Sinks(run, run.folder, event["step"], on_event)
        if sinks:
            sinks.event(event)

    try:
        yield event_and_trackers
    finally:
        if sinks:
            sinks.close()


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Keep what Ray Train's controller prints on the driver off the console."""
    import logging

    loggers = [logging.getLogger(name) for name in ("ray.train", "ray")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers if silent else []:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _cause(failure: BaseException | None, crashes: list[str], run: Run) -> RunError:
    """The first real cause of a failed run, once."""
    cause = crashes[0] if crashes else str(failure or "the workers ended without a word")
    return RunError(
        f"the run failed, and starting its workers again did not help; the first cause:\n\n{cause.strip()}\n",
        where=run.folder,
        hint="the last commit is whole: the same command goes on from it",
    )
