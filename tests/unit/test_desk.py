"""The desk: who waits for room keeps nobody of another kind waiting; how many trials `auto` is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ftray.tune import desk
from ftray.tune.desk import MOST, Desk


class Seat:
    """A worker's handle: each of its methods has a `remote`."""

    def __init__(self, room: int) -> None:
        self.room, self.there = room, list[str]()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(type(self), f"_{name}").__get__(self))

    async def _join(self, trial: str, run: dict[str, Any], **_: Any) -> None:
        self.there.append(trial)

    async def _leave(self, trial: str) -> None:
        self.there.remove(trial)

    async def _load(self) -> dict[str, int]:
        return {"lanes": len(self.there), "room": max(0, self.room - len(self.there))}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    monkeypatch.setattr(desk, "_AGAIN_SECONDS", 0.01)


def test_a_lane_that_waits_for_room_keeps_no_run_waiting() -> None:
    async def play() -> None:
        lanes, runs = Seat(1), Seat(1)
        table = Desk({"lanes": [lanes], "runs": [runs]}, waits=False)
        await table.attach("0", {}, "lanes", None)
        waiting = asyncio.ensure_future(table.attach("1", {}, "lanes", None))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(table.attach("2", {}, "runs", None), 5)
        assert not waiting.done()
        table.leave("0")
        await asyncio.wait_for(waiting, 5)
        assert (lanes.there, runs.there) == (["1"], ["2"])

    asyncio.run(play())


def test_who_came_first_gets_the_first_room() -> None:
    async def play() -> None:
        seat = Seat(1)
        table = Desk({"lanes": [seat]}, waits=False)
        order = list[str]()

        async def come(trial: str) -> None:
            await table.attach(trial, {}, "lanes", None)
            order.append(trial)
            table.leave(trial)

        await asyncio.gather(*(come(str(i)) for i in range(4)))
        assert order == ["0", "1", "2", "3"]

    asyncio.run(play())


def test_how_many_at_once() -> None:
    table = Desk({"lanes": [Seat(40), Seat(3)], "runs": [Seat(40)]}, waits=False)
    assert asyncio.run(table.room("lanes")) == MOST + 3, "as the search file's `concurrency` says"
    assert asyncio.run(table.room("runs")) == 40
    assert asyncio.run(Desk({"lanes": [Seat(0)]}, waits=False).room("lanes")) == 1
