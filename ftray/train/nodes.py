"""The machines of the cluster that a run is on: asked one by one, and whether they see the same files."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftray.config import Run
from ftray.errors import FtrayError, RunError
from ftray.jobs.luggage import Luggage
from ftray.manifest import filesystem, is_local, join, write_text
from ftray.session import cause_of, in_a_package

_TRIES = 3


def working_nodes() -> list[dict[str, Any]]:
    """What Ray tells of each living node that has CPUs or GPUs for work."""
    import ray

    return [n for n in ray.nodes() if n["Alive"] and (n["Resources"].get("CPU") or n["Resources"].get("GPU"))]


def on_each(nodes: Sequence[Mapping[str, Any]], function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns on each of these nodes. Raises what it raises: an FtrayError as such."""
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    try:
        return ray.get([task.options(scheduling_strategy=place).remote(*arguments) for place in places])
    except RayTaskError as error:
        cause = cause_of(error)
        raise cause if isinstance(cause, FtrayError) else error from None


def folders_of(run: Run) -> dict[str, str]:
    """What all nodes of a run write and read: path or URI by the key of the run file."""
    return {"output": run.folder, "data.cache": run.data.cache or run.folder}


def refuse_package(folders: Mapping[str, str]) -> None:
    """Raises ConfigError for a relative path in a job's own folder, which Ray removes after the job. `folders` as of
    `folders_of`."""
    for key, folder in folders.items() if in_a_package() else []:
        hint = f"write to storage that all hosts share: {key}=s3://bucket/{{name}}, or an absolute path on NFS"
        Luggage().check_output(folder, key, hint)


def refuse_unshared(folders: Mapping[str, str], seen: set[str] | None = None) -> None:
    """Raises RunError where another node does not see what is written into one of `folders` here: a run's workers go on
    from the same commits and read the same prepared rows. `folders` as of `folders_of`; `seen`: ids of nodes that were
    asked before, and are not asked again."""
    from ray.exceptions import RayError

    seen = set() if seen is None else seen
    for _ in range(_TRIES):
        others = _others(seen)
        if not others:
            return
        try:
            _refuse_unshared(folders, others)
        except RayError:  # one of them was lost meanwhile: ask the others
            continue
        seen.update(node["NodeID"] for node in others)


def _others(seen: set[str]) -> list[dict[str, Any]]:
    """Working nodes that this process does not run on, without those `seen`. A driver's own node may have no work."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return [node for node in working_nodes() if node["NodeID"] != here and node["NodeID"] not in seen]


def _refuse_unshared(folders: Mapping[str, str], nodes: Sequence[Mapping[str, Any]]) -> None:
    marks = {key: join(folder, f".seen-{uuid.uuid4().hex}") for key, folder in folders.items()}
    try:
        for mark in marks.values():
            write_text(mark, "ftray looks whether all nodes see this\n")
        # absolute, because each node's processes have working directories of their own
        places = {key: filesystem(mark)[1] if is_local(mark) else mark for key, mark in marks.items()}
        for host, missing in on_each(nodes, _not_seen, places):
            for key, reason in missing.items():
                raise RunError(
                    f"{host} does not see this folder as it is here: {reason}",
                    where=f"{key} {filesystem(folders[key])[1] if is_local(folders[key]) else folders[key]}",
                    hint=f"set {key} to a URI (s3://…, gs://…) or to a folder that all nodes mount under one path",
                )
    finally:
        for mark in marks.values():
            fs, path = filesystem(mark)
            if fs.exists(path):
                fs.rm(path)


def _not_seen(places: dict[str, str]) -> tuple[str, dict[str, str]]:
    """On each node: (its name, why it cannot read the mark, by key)."""
    missing = {}
    for key, place in places.items():
        try:
            fs, path = filesystem(place)
            fs.invalidate_cache()
            if not fs.exists(path):
                missing[key] = "a file that was just written there is missing"
        except Exception as error:  # noqa: BLE001 - whatever a store raises, it is told
            missing[key] = f"{type(error).__name__}: {error}"
    return socket.gethostname(), missing
