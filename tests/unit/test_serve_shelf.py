"""What is counted of adapters, by adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftray.engine.adapters import Adapters
from ftray.errors import ArtefactError
from ftray.model.served import Adapter
from ftray.registry.ref import Ref
from serve import replica
from serve.config import ServeConfig
from serve.replica import Shelf


class Copies:
    """A cache in which every adapter lies but the broken one."""

    @contextmanager
    def get(self, ref: Ref) -> Iterator[Path]:
        if ref.name == "broken":
            raise ArtefactError("it is broken")
        yield Path()


@pytest.fixture
def shelf() -> Shelf:
    base: Any = SimpleNamespace(read=lambda folder: Adapter({}, {}, prompt=torch.zeros(1, 4)))
    found = Shelf(ServeConfig.model_validate({"model": {"path": "embedded"}}), base)
    found._cache = Copies()  # type: ignore[assignment]
    return found


def ref(name: str, i: int = 0) -> Ref:
    return Ref("acme", name, f"{i:064x}")


def test_every_eviction_is_counted_and_when_it_happens(shelf: Shelf) -> None:
    """Also of one that came and went between two looks."""
    adapters = Adapters(SimpleNamespace(), shelf.load, on_device=1, memory=0, threads=1, wake=lambda: None)  # type: ignore[arg-type]
    try:
        for round in (1, 2, 3):
            held = adapters.want(ref("cheese"), "acme")
            while not adapters._ended:
                time.sleep(0.01)
            adapters.collect()
            who = ("acme", f"{0:064x}")
            assert shelf.counted()["evictions"][who] == round - 1, "in use, it stays"
            adapters.leave(held)
            del held
            assert adapters.evictions == round
            if round != 2:  # nobody looks after the second
                assert shelf.counted()["evictions"][who] == round
        assert shelf.counted()["loads"] == {who: 3}
    finally:
        adapters.close()


def test_what_is_counted_of_adapters_is_bounded(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "MOST_SERIES", 3)
    for i in range(10):
        shelf.load(ref("cheese", i))
        with pytest.raises(ArtefactError):
            shelf.load(ref("broken", 100))
    found = shelf.counted()
    for counts in found.values():
        assert len(counts) <= 3
    assert found["failures"]["acme", f"{100:064x}"] == 10
