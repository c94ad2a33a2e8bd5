"""Places for workers on Ray: how many there can be, and the wait for the first of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftray.errors import ConfigError, RunError
from ftray.train.nodes import working_nodes
from ftray.train.places import nodes_in_words

OnEvent = Callable[[dict[str, Any]], None]
WAIT_SECONDS = 600.0
"""For the first place, as a run waits by default."""
_TOLD_AFTER = 5.0
"""Seconds of a wait before it is told."""
_SETTLE_SECONDS = 10.0
"""For more places than the first: they are seldom given back all at once."""


def share(wanted: int | None, parts: int | None = None) -> tuple[int, dict[str, int]]:
    """As `shared`, of the cluster that we are connected to."""
    return shared([node["Resources"] for node in working_nodes()], wanted, parts)


def shared(
    nodes: Sequence[Mapping[str, float]], wanted: int | None, parts: int | None = None
) -> tuple[int, dict[str, int]]:
    """(number of workers, no more than there are parts; what Ray reserves for each): a GPU each, or without GPUs a
    machine's cores. Raises RunError where there is room for none, ConfigError where there is none for `wanted`."""
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    gpus = sum(int(min(node.get("GPU", 0), node.get("CPU", 0))) for node in nodes)
    if not cores:
        raise RunError(
            "no node has a CPU for a worker", where="cluster", hint="add nodes, or start theirs with --num-cpus"
        )
    count = wanted or gpus or len(cores)
    count = min(count, parts) if parts else count
    kind, room = ("GPU", gpus) if gpus else ("CPU", sum(cores))
    if count > room:
        raise ConfigError(
            f"{count} workers × 1 {kind} take {count}, and the cluster has {room}",
            where="--workers",
            hint=f"at most {room}",
        )
    if gpus:
        return count, {"num_gpus": 1, "num_cpus": 1}
    on_one = -(-count // len(cores))
    return count, {"num_cpus": max(1, min(cores) // on_one)}


def first(references: list[Any], resources: Mapping[str, int], on_event: OnEvent) -> Any:
    """The first of these to be there, each of which waits for a place of its own. Raises RunError when none is in
    time."""
    import ray

    done, _ = ray.wait(references, timeout=min(_TOLD_AFTER, WAIT_SECONDS))
    if not done:
        each = " and ".join(f"{count} {name.removeprefix('num_')[:-1].upper()}" for name, count in resources.items())
        text = f"waiting for a worker's place, {each}, for at most {WAIT_SECONDS:.0f} s"
        on_event({"kind": "status", "text": text})
        done, _ = ray.wait(references, timeout=max(0.0, WAIT_SECONDS - _TOLD_AFTER))
    if not done:
        raise RunError(
            f"for {WAIT_SECONDS:.0f} s no node had {each} free for a worker. Nodes: {nodes_in_words()}",
            where="cluster",
            hint="others hold them: the same command once they are free, or on more nodes",
        )
    return done[0]


def places(count: int, resources: Mapping[str, int], on_event: OnEvent) -> int:
    """How many of `count` workers have a place now, at least one. Raises RunError when none has in time."""
    import ray
    from ray.util import placement_group, remove_placement_group

    each = {name.removeprefix("num_")[:-1].upper(): amount for name, amount in resources.items()}
    groups = [placement_group([each]) for _ in range(count)]
    try:
        standing = [group.ready() for group in groups]
        first(standing, resources, on_event)
        return len(ray.wait(standing, num_returns=count, timeout=_SETTLE_SECONDS)[0])
    finally:
        for group in groups:
            remove_placement_group(group)
