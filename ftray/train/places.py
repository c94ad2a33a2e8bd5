"""Places for workers on the cluster: who has room, who is about to go, and how long that may take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ftray.errors import ConfigError, RunError, RunStopped

Resources = dict[str, float]
"""Of one worker, by Ray's names: CPU, GPU."""
SETTLE_SECONDS = 10.0
"""How long fewer places than could be are looked at before workers start on them: nodes seldom come, and places are
seldom given back, all at once."""
_POLL_SECONDS = 0.25
_LARGE = 10**9
"""Parameters of a base that nobody trains on CPUs without saying so."""


class Places:
    """Room for workers, one placement group for each that is wanted.

    While one waits it is a wish that an autoscaler sees; once it stands it is a place on a node that answers, and that
    nobody else takes. It is given back at once before workers start there: Ray Train makes a group of its own.
    """

    def __init__(self, each: Resources) -> None:
        self.each = each
        self._groups: list[Any] = []

    def ask(self, count: int) -> None:
        """Want `count` places, those that stand already among them."""
        from ray.util import placement_group, remove_placement_group

        while len(self._groups) < count:
            self._groups.append(placement_group([dict(self.each)]))
        while len(self._groups) > count:
            remove_placement_group(self._groups.pop())

    def ready(self) -> int:
        from ray.util import placement_group_table

        return sum(placement_group_table(group)["state"] == "CREATED" for group in self._groups)

    def give_back(self) -> None:
        self.ask(0)


def enough(ready: int, least: int, most: int, waited: float) -> bool:
    """Whether workers start on `ready` places after `waited` seconds, or more places are waited for."""
    return ready >= most or (ready >= least and waited >= SETTLE_SECONDS)


def wait_for_places(
    each: Resources,
    least: int,
    most: int,
    *,
    seconds: float,
    limit: float,
    stop: threading.Event,
    folder: str,
    tell: Callable[[str], None],
) -> int:
    """How many workers can start now, from `least` to `most`. `seconds` may still pass, of `limit` altogether. Raises
    RunError, which says what is missing, once they have passed, and RunStopped when `stop` is set."""
    places, began, told = Places(each), time.monotonic(), False
    places.ask(most)
    try:
        while True:
            ready, waited = places.ready(), time.monotonic() - began
            if enough(ready, least, most, waited):
                return min(ready, most)
            if stop.is_set():
                raise RunStopped("stopped while it waited for places", where=folder, hint="the same command goes on")
            if waited >= seconds:
                raise RunError(
                    missing(each, least, ready, limit, nodes_in_words()),
                    where=folder,
                    hint="the last commit is whole: the same command goes on once there is room; or set workers.min and"
                    " workers.max, lower what each worker asks for, raise workers.wait_seconds",
                )
            if not told and waited >= 2:
                told = True
                tell(f"waiting for places for {least} {_plural(least)}: {ready} of them {'is' if ready == 1 else 'are'}"
                     f" there; for at most {seconds:.0f} s")  # fmt: skip
            time.sleep(_POLL_SECONDS)
    finally:
        places.give_back()


def refuse_guessed_cpus(gpus: float | str, cluster: Mapping[str, float], parameters: int | None) -> str | None:
    """What `workers.gpus: auto` comes to on a cluster that has no GPU now, though machines with GPUs may come yet: a
    warning, None where nobody guesses. Raises ConfigError where CPUs would be no more than a guess: before any node
    with work is there, as where an autoscaler starts them, and for a large base. `cluster`: its resources;
    `parameters`: of the base, None where it is not known."""
    if gpus != "auto" or cluster.get("GPU"):
        return None
    hint = "set workers.gpus=1 to wait for GPUs, workers.gpus=0 to train on CPUs"
    if not cluster.get("CPU"):
        told = "it is auto, and the cluster has no GPU now, nor any node with work: which kind will come is not known"
        raise ConfigError(told, where="workers.gpus", hint=hint)
    if parameters is not None and parameters >= _LARGE:
        told = f"it is auto, and the cluster has no GPU now: {parameters / 1e9:.1f} billion parameters, on CPUs?"
        raise ConfigError(told, where="workers.gpus", hint=hint)
    return f"the cluster has no GPU now, so the workers take CPUs; {hint}"


def missing(each: Resources, least: int, ready: int, limit: float, nodes: str) -> str:
    """The sentence for a run that waited in vain."""
    one = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
    lacks = " and ".join(f"{amount * (least - ready):g} {name}" for name, amount in each.items())
    return (
        f"{least} {_plural(least)} × {one} need a place each, and for {limit:g} s the cluster had room for {ready}:"
        f" {lacks} are missing. Its nodes: {nodes}"
    )


def _plural(count: int) -> str:
    return "worker" if count == 1 else "workers"


def nodes_in_words() -> str:
    """Each node with its resources and whether it stays."""
    import ray

    leaving, words = draining(), []
    for node in ray.nodes():
        has = ", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        state = "lost" if not node["Alive"] else "being drained" if node["NodeID"] in leaving else has
        words.append(f"{node['NodeManagerAddress']} ({state})")
    return "; ".join(sorted(words))


def draining() -> dict[str, float]:
    """Nodes that are being drained, by their ids: seconds until they go, infinite where nobody said."""
    from ray._private.state import state  # Ray Train's own watcher asks here too; there is no public way

    now = time.time()  # Ray's deadlines are of the wall clock
    return {node: at / 1000 - now if at else float("inf") for node, at in state.get_draining_nodes().items()}


def lost_nodes(nodes: set[str]) -> set[str]:
    """Those of `nodes` that Ray knows to be gone."""
    import ray

    return nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}
