"""The desk: one small Ray actor that says which worker a trial goes to, and tells all trials when the search ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from ftray.errors import FtrayError, RunError
from ftray.session import cause_of

MOST = 16
"""Lanes of one worker at once, if nothing else is asked for. Each has a light actor, which takes 2 s of a core to start
and 0.11 GiB, and the larger a batch is, the less it gains from one more lane."""
_AGAIN_SECONDS = 0.2
_PATIENCE_SECONDS = 180.0
"""How long a worker that was lost may take to come back."""


class NotHere(RunError):
    """A worker does not know the trial: it was lost and started again since the trial joined."""


class Desk:
    """An async actor. `seats` are handles by kind, `lanes` and `runs`: actors with the methods of `ftray.tune.host`:
    join, next, commit, leave, load."""

    def __init__(self, seats: dict[str, list[Any]], waits: bool) -> None:
        self._seats, self._waits = seats, waits
        self._at: dict[str, Any] = {}
        self._choosing = {kind: asyncio.Lock() for kind in seats}  # who waits for a lane keeps no run waiting
        self._locks: dict[str, asyncio.Lock] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()

    async def attach(self, trial: str, run: dict[str, Any], kind: str, source: str | None) -> Any:
        """Let a trial join the worker of its kind that has the most room, and return that worker's handle. Waits for
        room. A place that the trial still has is given up first. Raises FtrayError."""
        async with self._locks.setdefault(trial, asyncio.Lock()):
            await self._leave(trial)
            async with self._choosing[kind]:  # who comes next sees this one there
                seat = self._seats[kind][await self._choose(kind)]
                joined = seat.join.remote(trial, run, waits=self._waits, source=source)
            self._at[trial] = seat
            try:
                await joined
            except Exception as error:  # noqa: BLE001 - it goes on as what it was before Ray wrapped it
                self._at.pop(trial, None)
                raise cause_of(error) from None
            return seat

    async def _choose(self, kind: str) -> int:
        from ray.exceptions import RayError

        waited = 0.0
        while True:
            loads = await asyncio.gather(*(s.load.remote() for s in self._seats[kind]), return_exceptions=True)
            room = {
                i: (load["room"], -load["lanes"]) for i, load in enumerate(loads) if not isinstance(load, BaseException)
            }
            if not room:
                waited += _AGAIN_SECONDS
                errors = [load for load in loads if isinstance(load, BaseException)]
                if waited > _PATIENCE_SECONDS or not all(isinstance(e, RayError) for e in errors):
                    raise RunError(f"no worker is left that could take a trial: {cause_of(errors[0])}")
            elif max(room.values())[0] > 0:
                return max(room, key=lambda i: room[i])
            await asyncio.sleep(_AGAIN_SECONDS)

    def leave(self, trial: str) -> None:
        """The trial's place is free; returns at once. A trial that has none is ignored."""
        task = asyncio.ensure_future(self._leave_in_turn(trial, self._at.get(trial)))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave_in_turn(self, trial: str, seat: Any) -> None:
        async with self._locks.setdefault(trial, asyncio.Lock()):
            if seat is not None and self._at.get(trial) is seat:
                await self._leave(trial)

    async def _leave(self, trial: str) -> None:
        from ray.exceptions import RayError

        if (seat := self._at.pop(trial, None)) is not None:
            with suppress(FtrayError, RayError):  # told to `next` before; a worker that is gone has no places
                await seat.leave.remote(trial)

    async def close(self) -> None:
        """Every trial leaves; answers once all have."""
        for trial in list(self._at):
            self.leave(trial)
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def room(self, kind: str) -> int:
        """Trials that could run at once on the workers of this kind, at least 1."""
        loads = await asyncio.gather(*(s.load.remote() for s in self._seats[kind]), return_exceptions=True)
        known = [load["lanes"] + load["room"] for load in loads if not isinstance(load, BaseException)]
        return max(1, sum(min(number, MOST) if kind == "lanes" else number for number in known))

    async def stop(self) -> None:
        """The search is to end: trials commit and leave."""
        self._stop.set()

    async def stopped(self) -> bool:
        """Answers once the search is to end."""
        return await self._stop.wait()
