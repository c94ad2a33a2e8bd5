"""The driver's eye on a group of workers: who hangs, which nodes are about to go, whether there is room for more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from ftray.config import Run
from ftray.train.places import SETTLE_SECONDS, Places, Resources, draining, lost_nodes
from ftray.train.pulse import SILENT_SECONDS, Life, end_process, hanging

_LOOK_SECONDS = 1.0
_KILL_SECONDS = 15.0
_ENDED_SECONDS = 30.0
"""How long Ray Train may take to notice that a worker was ended from here; until then it would be found again."""
_PARTING_SECONDS = 2.0
"""What a worker may take to end itself once it has heard nothing for SILENT_SECONDS."""


class Listener(Protocol):
    moving: bool
    """The group was asked to leave, and another follows it."""

    def status(self, text: str) -> None: ...


class Retries:
    """How often workers may start again after a failure: `limit` times, without a new commit in between; -1: always."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._in_a_row = 0
        self._newest: list[int] | None = None

    def another(self, newest: list[int]) -> bool:
        """Whether they may start again now. `newest`: the step of the newest commit, if there is one."""
        if self._newest is not None and newest > self._newest:
            self._in_a_row = 0
        self._newest = newest
        self._in_a_row, self.used = self._in_a_row + 1, self.used + 1
        return self.limit < 0 or self._in_a_row <= self.limit


class Watch:
    """A thread that looks at one group, from its start to its end."""

    def __init__(self, board: Any, run: Run, each: Resources, size: int, tell: Listener) -> None:
        self._board, self._run, self._size, self._tell = board, run, size, tell
        self._more = run.workers.most - size
        self._places = Places(each)
        self._room_since: float | None = None
        self._room = 0
        self._done = threading.Event()
        self.causes: list[str] = []
        """Why workers were ended from here."""

    def __enter__(self) -> Watch:
        self._tell.moving = False
        self._thread = threading.Thread(target=self._look_on, name="ftray-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=60)
        self._places.give_back()

    def _look_on(self) -> None:
        import ray
        from ray.exceptions import RayError

        while not self._done.wait(_LOOK_SECONDS):
            try:
                self._look(ray.get(self._board.lives.remote(), timeout=30))
            except RayError as error:  # the next look may see more; without the board the relay ends the run
                self._tell.status(f"warning: the workers cannot be watched just now: {error}")

    def _look(self, lives: list[Life]) -> None:
        if found := hanging(lives, self._run.workers.stall_seconds):
            life, reason = found
            self.causes.append(reason)
            self._tell.status(f"{reason}; it is ended, and the workers start again")
            end_all([life])
            self._done.wait(_ENDED_SECONDS)
            return
        if self._tell.moving or not lives:
            return
        leaving = draining()
        hosts = sorted({life.host for life in lives if life.node in leaving})
        if hosts:
            seconds = min(leaving[life.node] for life in lives if life.node in leaving)
            within = f" within {seconds:.0f} s" if seconds != float("inf") else ""
            self._leave(f"node {', '.join(hosts)} is being drained{within}: committing, to go on elsewhere")
        elif self._more and self._has_room(len(lives)):
            self._leave(f"there is room for {self._room} more: committing, to go on with {self._size + self._room}")

    def _has_room(self, joined: int) -> bool:
        """Whether there has been room for more for a while, and no more came just now."""
        if joined < self._size:
            return False
        self._places.ask(self._more)
        room, now = self._places.ready(), time.monotonic()
        if room != self._room or self._room_since is None:
            self._room, self._room_since = room, now
        return room == self._more or (room > 0 and now - self._room_since >= SETTLE_SECONDS)

    def _leave(self, why: str) -> None:
        self._tell.moving = True
        self._tell.status(why)
        self._board.leave.remote()

    def account(self, failure: Exception | None) -> str:
        """What became of a group that failed, in a line."""
        import ray

        if self.causes:
            return "starting the workers again from the last commit"
        members: list[Life] = ray.get(self._board.members.remote())
        gone = lost_nodes({life.node for life in members})
        if lost := [life for life in members if life.node in gone]:
            hosts = ", ".join(sorted({life.host for life in lost}))
            return f"node {hosts} was lost; starting the workers again from the last commit"
        if not members:
            return f"the workers did not start ({_first_line(failure)}); trying again"
        return "a worker was lost; starting the workers again from the last commit"


def _first_line(failure: Exception | None) -> str:
    text = str(getattr(failure, "controller_failure", failure)).strip() or type(failure).__name__
    return text.splitlines()[0]


def end_all(lives: Iterable[Life]) -> list[Life]:
    """See to it that these processes are gone, so that none of them writes beside those who follow. Returns those of
    whom it is not known: on a node that does not answer a worker ends itself once it misses the board; see
    `ftray.train.pulse`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    lives = list(lives)
    unreachable = lost_nodes({life.node for life in lives}) | draining().keys()
    task: Any = ray.remote(num_cpus=0, max_retries=0)(end_process)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(life.node, soft=False)).remote(
            life.pid, life.born
        ): life
        for life in lives
        if life.node not in unreachable
    }
    answered, late = ray.wait([*asked], num_returns=len(asked), timeout=_KILL_SECONDS) if asked else ([], [])
    for one in late:
        ray.cancel(one)
    gone = {asked[one].rank for one in answered if _is_true(one)}
    return [life for life in lives if life.rank not in gone]


def _is_true(reference: Any) -> bool:
    """What a task answered; False where its node was lost meanwhile."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError:
        return False


def wait_out(
    lives: Callable[[], list[Life]], left: Iterable[Life], stop: threading.Event, tell: Callable[[str], None]
) -> None:
    """Wait until no worker of a group that is over can write into the run's folder any more. `lives`: those whose loops
    have not ended, as the board knows them; `left`: those of whom it is not known that they are gone.

    The first worker alone writes. On a machine that cannot be reached, its time is up when it has heard nothing for
    SILENT_SECONDS: it ends itself then. A machine that is gone costs the same wait, for from here it looks the same.
    """
    ranks, told = {life.rank for life in left}, False
    while writer := next((life for life in lives() if life.rank == 0 and life.rank in ranks), None):
        seconds = SILENT_SECONDS + _PARTING_SECONDS - writer.silent
        if seconds <= 0 or stop.is_set():
            return
        if not told:
            told = True
            tell(
                f"{writer.where()}, which writes the commits, cannot be reached and may live: waiting {seconds:.0f} s,"
                " until it has ended by itself"
            )
        stop.wait(min(seconds, _LOOK_SECONDS))
