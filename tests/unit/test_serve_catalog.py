"""Names when the registry does not answer: what is known goes on, for a while, and nobody else waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ftray.errors import RunError, UnknownAdapter
from ftray.registry.ref import Ref
from serve import catalog
from serve.catalog import Caller, Catalog
from serve.config import ServeConfig
from serve.errors import ApiError
from tests.clocks import skip

ACME = Caller("acme")


class Store:
    """A registry that answers, refuses, or stands still."""

    def __init__(self) -> None:
        self.there = {"cheese": "a" * 64}
        self.down: Exception | None = None
        self.moves = threading.Event()
        self.moves.set()
        self.asked = 0

    def resolve(self, tenant: str, name: str, digest: str | None = None) -> Ref:
        self.asked += 1
        self.moves.wait(60)
        if self.down:
            raise self.down
        if name not in self.there:
            raise UnknownAdapter("no such adapter")
        return Ref(tenant, name, self.there[name])

    def entries(self, tenant: str | None = None) -> list[Any]:
        self.resolve("acme", "cheese")
        return []


@pytest.fixture
def store() -> Iterator[Store]:
    found = Store()
    yield found
    found.moves.set()


def names(store: Store, *, outage: float, seconds: float = 0.0) -> Catalog:
    return Catalog(store, "base", None, seconds, outage)  # type: ignore[arg-type]


async def refused(asking: Coroutine[Any, Any, Any]) -> int:
    with pytest.raises(ApiError) as error:
        await asking
    return error.value.status


DOWN: list[Exception] = [RunError("no route to the store"), OSError("broken pipe")]


@pytest.mark.parametrize("down", DOWN, ids=str)
def test_a_known_name_outlives_an_outage(store: Store, down: Exception) -> None:
    async def main() -> None:
        found = names(store, outage=60)
        ref = await found.choose(ACME, "cheese")
        store.down = down
        asked = store.asked
        for _ in range(3):
            assert await found.choose(ACME, "cheese") == ref
        assert store.asked == asked + 3, "it is asked all the while"
        assert found.error == str(down)
        assert await refused(found.choose(ACME, "brie")) == 503
        found.refresh()
        assert await found.choose(ACME, "cheese") == ref
        store.down, store.there["cheese"] = None, "b" * 64
        assert await found.choose(ACME, "cheese") == Ref("acme", "cheese", "b" * 64)
        assert found.error is None

    asyncio.run(main())


def test_but_not_for_ever(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(catalog, "time", SimpleNamespace(monotonic=lambda: now))

    async def main() -> None:
        nonlocal now
        found = names(store, outage=0.3)
        await found.choose(ACME, "cheese")
        store.down = RunError("down")
        assert await found.choose(ACME, "cheese")
        now += 0.35
        assert await refused(found.choose(ACME, "cheese")) == 503
        assert not found._refs._found, "nothing is kept of it"
        none = names(store, outage=0)
        assert await refused(none.choose(ACME, "cheese")) == 503

    asyncio.run(main())
    assert ServeConfig.model_validate({"model": {"path": "embedded"}}).outage_seconds == 3600


def test_what_is_known_to_be_gone_does_not_come_back(store: Store) -> None:
    async def main() -> None:
        found = names(store, outage=60)
        await found.choose(ACME, "cheese")
        del store.there["cheese"]
        assert await refused(found.choose(ACME, "cheese")) == 404
        store.down = RunError("down")
        assert await refused(found.choose(ACME, "cheese")) == 503

        store.down, store.there["cheese"] = None, "a" * 64
        await found.choose(ACME, "cheese")
        found.forget()  # after a change that the registry took
        store.down = RunError("down")
        assert await refused(found.choose(ACME, "cheese")) == 503

    asyncio.run(main())


def test_a_registry_that_stands_still_holds_up_nobody_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "RESOLVE_SECONDS", 40.0)
    monkeypatch.setattr(catalog, "PATIENCE_SECONDS", 0.2)

    async def main() -> None:
        found = names(store, outage=60)
        ref = await found.choose(ACME, "cheese")
        store.moves.clear()
        asking = [asyncio.ensure_future(refused(found.choose(ACME, f"n{i}"))) for i in range(100)]
        assert await found.choose(ACME, "cheese") == ref
        assert await found.choose(ACME, "cheese") == ref
        pool: list[Callable[[], Any]] = [threading.current_thread] * 40
        await asyncio.gather(*(asyncio.to_thread(call) for call in pool))
        assert not any(one.done() for one in asking), "asyncio's own threads are free, and what is known is told"
        skip(asyncio.get_running_loop(), 40.0)
        assert set(await asyncio.gather(*asking)) == {503}
        assert found._threads._work_queue.qsize() == 0, "nothing piles up behind it"
        store.moves.set()
        while await found.choose(ACME, "cheese") != ref or found.error:
            await asyncio.sleep(0.01)

    asyncio.run(main())
