"""One way to be connected to Ray. Ray is imported inside: this module costs nothing to import."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ftray.redact import redact


def in_a_job() -> bool:
    """True inside `ray job submit`, or where RAY_ADDRESS names a cluster."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs that this process may keep busy: those it may run on, and no more than its container's limit (cgroup v2's
    `cpu.max`, rounded up). A machine may have many more, and threads beyond the limit only wait for each other."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    inside = Path("/")
    with suppress(OSError, StopIteration):
        inside = Path(next(line[3:].strip() for line in own.read_text().splitlines() if line.startswith("0::")))
    for group in (inside, *inside.parents):
        with suppress(OSError, ValueError):  # no limit is the word `max`
            quota, period = (cgroups / group.relative_to("/") / "cpu.max").read_text().split()
            allowed = min(allowed, max(1, math.ceil(int(quota) / int(period))))
    return allowed


def in_the_users_process() -> bool:
    """True where a user's command runs, False in an actor of Ray's. Needs a Ray session."""
    import ray

    return ray.get_runtime_context().get_actor_id() is None


@contextmanager
def ray_session(*, verbose: bool = False, cpus: int | None = None) -> Iterator[None]:
    """Be connected to Ray: to the one this process has already, to the cluster that RAY_ADDRESS names, or to a local
    Ray of its own that ends with the block.

    A plain `ray.init()` would join any cluster it finds on the machine, so the address is always said. Ray's own
    output is silenced unless `verbose`: what workers have to say reaches the user through our own channel.
    """
    if not verbose:
        quiet_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # see ftray.train.watch: one process less
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "120")  # where a hung one cannot be reached
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "runtime_env": {"env_vars": beside_the_job(worker_environment(os.environ, verbose), os.environ)},
    }
    if in_a_job():
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), **options)
    else:
        # workers that Ray starts ahead of time know none of these variables, so no actor of ours would be one of them
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        ray.init(address="local", num_cpus=cpus or usable_cpus(), include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def quiet_ray() -> None:
    """Set what must be set before Ray is imported so that it stays silent."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # the raylet's paragraph on each worker that died: the run tells it in a line
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def worker_environment(environment: Mapping[str, str], verbose: bool) -> dict[str, str]:
    """Variables that workers on other machines need too. Ray writes them to its logs in plain text, so nothing that may
    be a secret is among them: local workers inherit it anyway, and the machines of a cluster must bring their own."""
    passed = {
        name: value
        for name, value in environment.items()
        if name.startswith(("RAY_TRAIN_", "RAY_DATA_", "FTRAY_", "HF_", "GLOO_", "NCCL_"))
        and not names_a_secret(name)
        and redact(value) == value
    }
    quiet = {} if verbose else {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    libraries = {name: environment.get(name, value) for name, value in (ALLOCATOR | THREADS).items()}
    end = {_PARTING: environment.get(_PARTING, "5")}
    return passed | {"TOKENIZERS_PARALLELISM": "false"} | end | libraries | quiet


_PARTING = "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"
"""How long Ray Train waits for workers to take leave of each other. One on a lost node never does, and the others are
ended anyway: 30 s by default, for nothing."""


def beside_the_job(variables: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """`variables` without those that the job's own runtime environment sets: its workers have them already, and Ray
    refuses a variable that stands in both."""
    of_the_job = (_runtime_env(environment).get("env_vars") or {}).keys()
    return {name: value for name, value in variables.items() if name not in of_the_job}


def in_a_package() -> bool:
    """Whether the working directory is what came with a job (`--working-dir`), or lies in it: it goes with the job."""
    return bool(_runtime_env(os.environ).get("working_dir")) and _PACKAGES in os.getcwd().split(os.sep)


_PACKAGES = "working_dir_files"
"""The folder in which Ray unpacks them."""


def _runtime_env(environment: Mapping[str, str]) -> dict[str, Any]:
    """Of the job that this process is the driver of; empty where it is that of none."""
    given = json.loads(environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return given.get("runtime_env") or {}


ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""glibc keeps the memory of one step for the next. Ray runs a worker's loop on a thread of its own, whose arena gives
memory back after every step (measured: 41 % more page faults than on the main thread, and with these 45 % fewer)."""
THREADS = {"GOMP_SPINCOUNT": "1000"}
"""OpenMP's threads wait awake for each other for microseconds, then sleep. By default they do so for milliseconds:
where another process wants a core, one spins for as long as the other is kept from computing (measured, target tokens a
second: 624 against 631 on a quiet machine, 320 against 188 beside one busy process). Read when OpenMP is loaded."""


def stand_aside() -> None:
    """Let Ray's helpers on a local Ray wake without taking the core from a worker that computes.

    Ten processes of Ray's wake a hundred times a second, and each time one does, all threads of a worker that has every
    core wait for it. As "batch" they keep their share of the processor and get it when the scheduler comes round; as
    "idle" they would starve on a machine that others keep busy. Workers, raylet and GCS are left alone. Does nothing
    on a cluster, or where the system has no such class.
    """
    if in_a_job() or not hasattr(os, "SCHED_BATCH"):
        return
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, OSError):  # it may have ended by now
            line = " ".join(process.cmdline()[:3])  # the raylet names workers' files further on
            if line.startswith(_HELPERS) or "/ray/dashboard/" in line or "/ray/_private/" in line:
                for thread in process.threads():
                    os.sched_setscheduler(thread.id, os.SCHED_BATCH, os.sched_param(0))


_HELPERS = tuple(
    f"ray::{name}"
    for name in (
        "Board",
        "DashboardAgent",
        "DatasetManager",
        "PlacementGroupCleaner",
        "RuntimeEnvAgent",
        "SynchronizationActor",
        "TrainController",
        "_AutoscalingCoordinatorActor",
    )
)


_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)


def names_a_secret(name: str) -> bool:
    """Whether a variable of this name may hold a secret."""
    return _SECRET.search(name) is not None


def cause_of(error: BaseException) -> BaseException:
    """The error that was raised far away, without what Ray put around it on its way."""
    from ray.exceptions import RayTaskError

    while isinstance(error, RayTaskError) and error.cause is not None:
        error = error.cause
    return error
