"""A Ray actor that holds one base, and runs as lanes of it. A run that joins goes on from its own commits, so whoever
started it may start it again elsewhere when this process dies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import threading
import traceback
from collections import deque
from dataclasses import replace
from typing import Any

from ftray.config import Run
from ftray.errors import ConfigError, FtrayError, RunError, RunStopped
from ftray.model.free import free_on
from ftray.model.room import Need, Room, need_of, room
from ftray.tune.desk import NotHere

_LEAVE_SECONDS = 0.1
_LEFT = "the lane left"


class _Guest:
    """One run here: the channel of its loop, and what is told to those who wait for it."""

    def __init__(self, name: str, run: Run, waits: bool, tells: bool, loop: asyncio.AbstractEventLoop) -> None:
        self.name, self.run, self.waits, self.tells = name, run, waits, tells
        self.events: deque[dict[str, Any]] = deque()
        """If it tells all: what happened and was not asked for yet."""
        self._told: asyncio.Queue[dict[str, Any] | BaseException] = asyncio.Queue()
        self._loop = loop
        self._pending: dict[str, Any] | None = None
        self._go_on: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stands = threading.Event()
        self.stop = False
        self.left = False
        """It was told to leave; a lane that has begun is told by its base."""
        self.need: Need | None = None
        """What the memory plan says, once the base is known."""
        self.ended = asyncio.Event()
        """Nothing is done for it any more, so that the run may go on elsewhere."""

    # on the lane's thread

    def emit(self, event: dict[str, Any]) -> None:
        if self.tells:
            self.events.append(event)
        if event["kind"] == "evaluation":
            self._pending = event

    def stop_requested(self) -> bool:
        return self.stop

    def before_step(self) -> None:
        """Tell the last evaluation, now that what belongs to it is committed, and wait if this run does."""
        if self._pending is None:
            return
        event, self._pending = self._pending, None
        if not self.waits or self.stop:
            self._tell(event)
            return
        self._stands.set()
        self._tell(event)
        self._go_on.get()

    def end(self, outcome: dict[str, Any] | BaseException) -> None:
        if self._pending is not None:
            self._tell(self._pending)
        self._tell(outcome)

    def _tell(self, what: dict[str, Any] | BaseException) -> None:
        self._loop.call_soon_threadsafe(self._told.put_nowait, what)

    # on the actor's event loop

    def release(self) -> None:
        if self._stands.is_set():
            self._stands.clear()
            self._go_on.put(None)

    async def next(self) -> dict[str, Any]:
        self.release()
        told = await self._told.get()
        if isinstance(told, BaseException):
            self._told.put_nowait(told)  # whoever asks again hears it again
            raise told
        if told["kind"] == "end":
            self._told.put_nowait(told)
        return told


class Host:
    """The actor. Its base is that of the first run that joins. `folder`: the user's, where paths begin."""

    def __init__(self, threads: int, folder: str = ".") -> None:
        import torch

        if os.path.isdir(folder):
            os.chdir(folder)
        torch.set_num_threads(max(1, threads))
        self._base: Any = None
        self._shapes: Any = None
        self._first: Need | None = None
        """What the first run takes."""
        self._room: Room | None = None
        self._guests: dict[str, _Guest] = {}
        self._placed: set[_Guest] = set()
        """Whose lanes have their place in memory; one that leaves has it until it has ended."""
        self._preparing, self._turn = asyncio.Lock(), asyncio.Lock()
        """One run at a time prepares, one waits for room; whoever joined first is first in both."""
        self._changed = asyncio.Condition()

    async def join(
        self,
        trial: str,
        run: dict[str, Any],
        *,
        waits: bool,
        tells: bool = False,
        source: str | None = None,
        restarts: int = 0,
    ) -> None:
        """A lane for this resolved run, once the memory plan has room for it beside the others; it goes on from the
        commit in the run's folder if there is one. After each evaluation it stands still until `next` is called again,
        if it `waits`; `events` has every event if it `tells`. `source`: a commit's folder to take weights and optimizer
        from, in place of the run's own. `restarts`: how often a host of this run was lost. Raises FtrayError."""
        parsed, loop = Run.model_validate(run), asyncio.get_running_loop()
        if trial in self._guests:
            raise RunError(f"{trial} is here already")
        guest = self._guests[trial] = _Guest(trial, parsed, waits, tells, loop)
        try:
            async with self._preparing:
                data = await asyncio.to_thread(self._prepare, guest, source)
            await self._find_place(guest)
            if source is not None:
                await asyncio.to_thread(self._adopt, parsed, data.digest, source)
            if guest.left:
                raise RunError(_LEFT)
        except BaseException:
            if self._guests.get(trial) is guest:
                del self._guests[trial]
            await self._give_place_back(guest)
            raise
        threading.Thread(
            target=self._run, args=(guest, data, restarts, loop), name=f"ftray-{trial}", daemon=True
        ).start()

    async def _find_place(self, guest: _Guest) -> None:
        """Wait for room; first come, first served, so that a large lane is not starved by small ones. Raises RunStopped
        or RunError when the lane is told to stop or to leave meanwhile."""
        room, need = self._room, guest.need
        assert room is not None
        assert need is not None

        def others() -> list[Need]:
            return [other.need for other in self._placed if other.need]

        async with self._turn, self._changed:
            if not room.fits(others(), need):
                text = f"waits until other lanes have ended: {room.arithmetic(others(), need)}"
                guest.emit({"kind": "status", "text": text})
            await self._changed.wait_for(lambda: guest.left or guest.stop or room.fits(others(), need))
            if guest.left:
                raise RunError(_LEFT)
            if not room.fits(others(), need):
                hint = "the same command goes on"
                raise RunStopped("stopped before there was room in memory for it", where=guest.run.folder, hint=hint)
            self._placed.add(guest)

    async def _give_place_back(self, guest: _Guest) -> None:
        async with self._changed:
            self._placed.discard(guest)
            guest.ended.set()
            self._changed.notify_all()

    async def next(self, trial: str) -> dict[str, Any]:
        """The lane's next event of kind "evaluation", or "end" with its "summary". Raises the lane's own error."""
        return await self._guest(trial).next()

    async def events(self, trial: str) -> list[dict[str, Any]]:
        """All that a lane that `tells` has told since the last call; nothing of a name that is not here."""
        taken, guest = [], self._guests.get(trial)
        while guest is not None and guest.events:
            taken.append(guest.events.popleft())
        return taken

    async def commit(self, trial: str) -> str:
        """The folder of the lane's newest commit; a lane that stands still has one of where it stands."""
        from ftray.train import commits

        folder = self._guest(trial).run.folder
        steps = await asyncio.to_thread(commits.steps_of, folder)
        if not steps:
            raise RunError("no commit yet", where=folder)
        return commits.place_of(folder, steps[-1])

    async def stop(self, trial: str) -> None:
        """Have the lane commit and end, or wait for room no longer; unknown names are ignored."""
        if (guest := self._guests.get(trial)) is not None:
            guest.stop = True
            guest.release()
            await self._look_again()

    async def _look_again(self) -> None:
        """Let those who wait for room see what they were told."""
        async with self._changed:
            self._changed.notify_all()

    async def leave(self, trial: str) -> None:
        """End the lane between steps, without a commit or an artefact, and answer once it has ended; unknown names are
        ignored."""
        if (guest := self._guests.pop(trial, None)) is None:
            return
        guest.left = True
        await self._look_again()
        while not guest.ended.is_set():
            if self._base is not None:
                self._base.expel(trial)  # again and again: a lane that has just joined is not known there yet
            guest.release()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(guest.ended.wait(), _LEAVE_SECONDS)

    async def load(self) -> dict[str, int]:
        """{"lanes": runs that are here or about to be, "room": how many more like the largest of them the memory plan
        admits}; before the first run the room is 1."""
        here = {guest for guest in (*self._guests.values(), *self._placed) if not guest.ended.is_set()}
        if self._room is None or self._first is None:
            return {"lanes": len(here), "room": max(0, 1 - len(here))}
        largest = max((guest.need for guest in here if guest.need), key=lambda need: need.own, default=self._first)
        return {"lanes": len(here), "room": self._room.more([guest.need or largest for guest in here], largest)}

    def _guest(self, trial: str) -> _Guest:
        if trial not in self._guests:
            raise NotHere(f"no run {trial} is here")
        return self._guests[trial]

    def _prepare(self, guest: _Guest, source: str | None) -> Any:
        """On a thread: the rows, the base, what the run takes beside it."""
        from ftray.data.prepare import prepare
        from ftray.data.prepared import PreparedData
        from ftray.manifest import join, write_text
        from ftray.train.sharing import difference, refusal

        run = guest.run
        if reason := refusal(run):
            raise ConfigError(f"this run cannot share a base with others: {reason}", where=run.name)
        data = PreparedData.open(prepare(run, guest.emit))
        if source is None:
            self._check_commits(run, data.digest)
        write_text(join(run.folder, "run.yaml"), run.to_yaml())
        if self._base is None:
            self._open(run)
        elif key := difference(run, self._base.run):
            raise ConfigError(f"this run needs another base than {self._base.run.name}: {key} differs")
        guest.need = need_of(run, self._shapes)
        return data

    def _adopt(self, run: Run, digest: str, source: str) -> None:
        adopt(run, digest, source, self._base.shapes_of(run))

    def _check_commits(self, run: Run, digest: str) -> None:
        from ftray.train import commits
        from ftray.train.identity import identity, refuse_other_run

        if committed := commits.newest_identity(run.folder):
            refuse_other_run(committed, identity(run, digest), run.folder)

    def _open(self, run: Run) -> None:
        from ftray.model.source import find_shapes
        from ftray.train.lanes import PASS_TOKENS, Base
        from ftray.train.world import World

        device = _device()
        limit = run.workers.gpu_memory_gib
        memory = int(limit * 2**30) if limit else free_on(device)
        assert memory is not None
        self._shapes = find_shapes(run.model)[0]
        found = room(run, self._shapes, memory, PASS_TOKENS[device.type])
        self._base = Base(run, World(device=device), found.tokens)
        self._room, self._first = found, need_of(run, self._shapes)

    def _run(self, guest: _Guest, data: Any, restarts: int, loop: asyncio.AbstractEventLoop) -> None:
        """On the lane's own thread."""
        from ftray.train.lane import LaneEnded

        try:
            summary = self._base.train(guest.name, guest.run, data, guest, restarts=restarts, hold=guest.before_step)
        except LaneEnded:
            guest.end(RunError(_LEFT))
        except FtrayError as error:
            guest.end(error)
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for this lane, and to nobody else
            guest.end(RunError(f"the lane failed: {error}\n\n{traceback.format_exc()}"))
        else:
            guest.end({"kind": "end", "summary": summary})
        finally:
            asyncio.run_coroutine_threadsafe(self._give_place_back(guest), loop)


def adopt(run: Run, digest: str, source: str, shapes: dict[str, Any]) -> None:
    """Make a commit of another run the one that `run` goes on from (population based training): its weights, optimizer
    and position, under this run's settings. What the run came to by itself counts no more: the best is this commit,
    until a later one is better. `shapes`: of what `run` trains, by name. Raises ArtefactError, and ModelError for a
    commit of other weights."""
    from ftray.manifest import join, write_text
    from ftray.model.methods import check_same
    from ftray.train import commits
    from ftray.train.identity import identity

    commit = commits.read(source)
    check_same(commit.state.model, shapes)
    theirs, log = commit.progress, join(run.folder, "metrics.jsonl")
    lines = _lines_up_to(theirs.step, log)
    write_text(log, lines)
    loss = theirs.loss_at(theirs.step)
    commit.identity = identity(run, digest)
    commit.progress = replace(
        theirs,
        best_loss=loss,
        best_step=None if loss is None else theirs.step,
        to_beat=loss,
        since_best=0,
        skipped_in_a_row=0,
        metrics_bytes=len(lines.encode()),
        finished=None,
    )
    commits.write(run.folder, commit)
    commits.prune(run.folder, newest=theirs.step, keep_last=run.train.keep_last, best=theirs.step)


def _lines_up_to(step: int, log: str) -> str:
    """The lines of a run's metrics before its first step after `step`."""
    from ftray.manifest import read_text

    kept = []
    try:
        lines = read_text(log).splitlines(keepends=True)
    except FileNotFoundError:
        return ""
    for line in lines:
        event: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"kind": "cut off"}
        if event["kind"] == "cut off" or (event["kind"] == "step" and event["step"] > step):
            break
        kept.append(line)
    return "".join(kept)


def _device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
