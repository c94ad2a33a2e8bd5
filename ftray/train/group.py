"""The workers of a run, made a group that can talk: Ray Train's torch backend, with a look at the network before it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from ftray.train import network
from ftray.train.network import Link


@dataclass
class GroupConfig(TorchConfig):
    """torch's process group over the interfaces of the nodes' addresses (`ftray.train.network`). The board is told who
    talks over what."""

    board: Any = None
    group: int = 0
    """Of the run's groups of workers, one after the other, as the board counts them."""

    @property
    def backend_cls(self) -> type:
        return GroupBackend


class GroupBackend(_TorchBackend):
    """Looks at the network each time a group of workers starts. What is wrong with it raises RunError in Ray Train's
    controller, which ends the run: it would be as wrong the next time."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        library = "nccl" if "nccl" in (backend_config.backend or "") else "gloo"
        links: list[Link] = worker_group.execute(_find_link, library)
        network.refuse_unreachable(links)
        first = {link.node: rank for rank, link in reversed(list(enumerate(links)))}
        """By node, the first worker there: if it reaches the others' nodes, so do the rest."""
        if len(first) > 1:
            _try(worker_group, [(rank, links[rank]) for rank in first.values()])
        worker_group.execute(_tell_library, library, len(first) > 1)
        if backend_config.board is not None:
            told = [{"kind": "status", "text": _in_words(library, links)}]
            backend_config.board.push.remote(backend_config.group, told)
        super().on_start(worker_group, backend_config)


def _try(worker_group: Any, ends: list[tuple[int, Link]]) -> None:
    """Each of these workers connects to all others. Raises RunError for the first that fails."""
    import ray

    ports = ray.get([worker_group.execute_single_async(rank, network.listen, link.address) for rank, link in ends])
    others = [
        [(other.address, port) for port, (_, other) in zip(ports, ends, strict=True) if other is not link]
        for _, link in ends
    ]
    tries = [
        worker_group.execute_single_async(rank, network.failures, there)
        for (rank, _), there in zip(ends, others, strict=True)
    ]
    try:
        for (_, mine), failed in zip(ends, ray.get(tries), strict=True):
            beside = [other for _, other in ends if other is not mine]
            for number, reason in failed:
                raise network.unreachable(mine, beside[number], reason)
    finally:
        ray.get([worker_group.execute_single_async(rank, network.close) for rank, _ in ends])


def _in_words(library: str, links: list[Link]) -> str:
    """`2 workers on 2 nodes: head (eth0, 10.0.0.2) 1, worker1 (eth0, 10.0.0.3) 1; gloo`."""
    counts = {str(link): 0 for link in links}
    for link in links:
        counts[str(link)] += 1
    workers = f"{len(links)} worker{'s' if len(links) > 1 else ''}"
    if len(counts) == 1:
        return f"{workers} on {links[0].host}"
    each = ", ".join(f"{count} on {link}" for link, count in counts.items())
    return f"{workers} on {len(counts)} nodes, over {library}: {each}"


def _find_link(library: str) -> Link:
    """On each worker."""
    import ray

    return network.find_link(library, ray.util.get_node_ip_address(), network.own_interfaces(), os.environ)


def _tell_library(library: str, several_nodes: bool) -> None:
    """On each worker."""
    import ray

    link = network.find_link(library, ray.util.get_node_ip_address(), network.own_interfaces(), os.environ)
    network.tell_library(library, link, several_nodes=several_nodes)
