"""Which engine replica a request goes to: one that has its adapter, unless that is busier than another need be.

The order of replicas for an adapter is a hash of both (rendezvous hashing, Thaler and Ravishankar 1998), so that every
ingress sends an adapter's requests to the same replica without asking, and a replica that comes or goes moves only its
own share. One where the adapter lies already goes before that order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from ftray.engine.request import Request


class AdapterRouter(RequestRouter):
    """Of Ray Serve's handles to the engine; runs inside the ingress."""

    queue_len_response_deadline_s = 2.0
    """How long a replica of which nothing is known may take to tell its load; then another is asked. Ray's tenth of a
    second is little on a busy machine: the other would read the adapter too. Of one that has died Ray hears sooner."""

    def initialize_state(self, slots: int = 32, **kwargs: Any) -> None:
        """`slots`: requests that a replica answers at once; one that has more is busy."""
        self._slots = slots

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        digest = None
        if pending_request is not None:
            if wanted := pending_request.kwargs.get("replica"):  # it is there that the events are
                return [[by_name[wanted]] if wanted in by_name else candidate_replicas]
            digest = next(
                (r.adapter.digest for r in pending_request.args if isinstance(r, Request) and r.adapter), None
            )
        order = rank(
            digest,
            {name: self._load(replica) for name, replica in by_name.items()},
            {name: set(replica.routing_stats.get("resident", ())) for name, replica in by_name.items()},
            self._slots,
        )
        return [[by_name[name]] for name in order]

    def _load(self, replica: RunningReplica) -> int:
        return self._replica_queue_len_cache.get(replica.replica_id) or 0


def rank(
    digest: str | None,
    load: Mapping[str, int],
    resident: Mapping[str, Set[str]],
    slots: int,
    hashed: Callable[[str, str], Any] | None = None,
) -> Sequence[str]:
    """Names of replicas, the best first. `load` is requests in flight, `resident` the digests that lie there.

    Without an adapter: the least loaded. With one: those with a free slot, first where it lies, then by hash; after
    them the busy ones, the least loaded first.
    """
    hashed = hashed or _hash
    if digest is None:
        return sorted(load, key=lambda name: (load[name], hashed("", name)))

    def key(name: str) -> tuple[Any, ...]:
        if load[name] >= slots:
            return 1, load[name], digest not in resident[name], hashed(digest, name)
        return 0, digest not in resident[name], hashed(digest, name)

    return sorted(load, key=key)


def _hash(digest: str, name: str) -> bytes:
    return hashlib.blake2b(f"{digest}/{name}".encode(), digest_size=8).digest()
