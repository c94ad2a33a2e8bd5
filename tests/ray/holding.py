"""Another job that holds a part of the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.util import placement_group, remove_placement_group


@contextmanager
def held(cpus: int) -> Iterator[None]:
    """So many CPUs are somebody else's."""
    group = placement_group([{"CPU": 1}] * cpus)
    assert group.wait(60)
    try:
        yield
    finally:
        remove_placement_group(group)
