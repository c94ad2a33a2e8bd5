"""Between a run's workers and its driver: an actor that passes events one way and wishes the other. No torch: it is
there before any worker is."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ftray.train.pulse import Life, Pulse, myself

_PUSH_SECONDS = 0.2
_HELD_SECONDS = 0.05
_ALIKE_SECONDS = 5.0
"""How long a worker that failed for good waits to hear that all others did too."""


class Board:
    """An actor between workers and driver: events one way, the wish to stop the other. It hears one group of workers at
    a time: what others say, who were followed by another and do not know it yet, changes nothing."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False
        self._leave = False
        self._group: int | None = None
        self._lives: dict[int, Life] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._parted: set[int] = set()
        self._error: Exception | None = None
        self._failures = 0
        self._summary: dict[str, Any] | None = None
        self._crashes: list[str] = []
        self._released = 0

    def open(self, group: int) -> None:
        """A new group of workers is about to start; what is left of those before it is to end."""
        self._group, self._leave, self._error, self._summary, self._failures = group, False, None, None, 0
        self._lives, self._heard, self._moved, self._parted = {}, {}, {}, set()

    def close(self) -> list[Life]:
        """The group is over: who of it still lives is to end, and is heard no more. Returns all who joined it."""
        self._group = None
        return self.members()

    def leave(self) -> None:
        """Have this group commit and give its places back."""
        self._leave = True

    def join(self, group: int, life: Life) -> bool:
        """A worker of `group` is there. False: another group has its place."""
        if group == self._group:
            self._lives[life.rank] = life
            self._heard[life.rank] = self._moved[life.rank] = time.monotonic()
        return group == self._group

    def beat(self, group: int, rank: int, marks: int, doing: str) -> str:
        """A sign of life. Answers `go on`, `stop` (commit and leave) or `end` (the process, at once)."""
        if group != self._group or rank not in self._lives:
            return "end"
        now, life = time.monotonic(), self._lives[rank]
        if marks != life.marks:
            self._moved[rank] = now
        self._heard[rank] = now
        self._lives[rank] = replace(life, marks=marks, doing=doing)
        return "stop" if self._stop or self._leave else "go on"

    def part(self, group: int, rank: int) -> None:
        """The worker's loop has ended: nothing more is expected of it."""
        if group == self._group:
            self._parted.add(rank)

    def lives(self) -> list[Life]:
        """Workers whose loops go on."""
        now = time.monotonic()
        return [
            replace(life, silent=now - self._heard[rank], stuck=now - self._moved[rank])
            for rank, life in sorted(self._lives.items())
            if rank not in self._parted
        ]

    def members(self) -> list[Life]:
        """All who joined this group."""
        return list(self._lives.values())

    def push(self, group: int, events: list[dict[str, Any]]) -> bool:
        if group != self._group:
            return False
        self._events += events
        return self._stop or self._leave

    def may_go_on(self, step: int) -> bool:
        """Whether a run that waits after the evaluation of `step` need not wait any longer."""
        return self._stop or self._leave or self._released >= step

    def drain(self, stop: bool, released: int = 0) -> list[dict[str, Any]]:
        self._stop |= stop
        self._released = max(self._released, released)
        events, self._events = self._events, []
        return events

    def fail(self, group: int, error: Exception) -> None:
        if group == self._group:
            self._error = self._error or error
            self._failures += 1

    def failures(self) -> int:
        return self._failures

    def crash(self, group: int, text: str) -> None:
        if group == self._group:
            self._crashes.append(text)

    def finish(self, group: int, summary: dict[str, Any]) -> None:
        if group == self._group:
            self._summary = summary

    def outcome(self) -> dict[str, Any]:
        return {"error": self._error, "summary": self._summary, "crashes": self._crashes}


class BoardChannel:
    """A worker's end of the board: events go in batches, and no step waits for them."""

    def __init__(self, board: Any, rank: int, *, group: int = 0, waits: bool = False) -> None:
        self._board, self._rank, self._group, self._waits = board, rank, group, waits
        self._pulse: Pulse | None = None
        self._waiting: list[dict[str, Any]] = []
        self._pushed_at = 0.0
        self._answer: Any = None
        self._stop = False

    def join(self) -> bool:
        """Be one of the group, with a pulse from now on. False when another group has its place."""
        import ray

        if ray.get(self._board.join.remote(self._group, myself(self._rank))):
            self._pulse = Pulse(self._board, self._group, self._rank)
        return self._pulse is not None

    def mark(self, doing: str) -> None:
        """The loop went a step forward, and is now at `doing`."""
        if self._pulse:
            self._pulse.mark(doing)

    def emit(self, event: dict[str, Any]) -> None:
        self._waiting.append(event)
        if event["kind"] != "step" or time.monotonic() - self._pushed_at >= _PUSH_SECONDS:
            self._push()
        if self._waits and event["kind"] == "evaluation":
            self._wait(event["step"])

    def _wait(self, step: int) -> None:
        """Stand still until the evaluation was judged; the other workers wait for this one."""
        import ray

        while not ray.get(self._board.may_go_on.remote(step)):
            time.sleep(_HELD_SECONDS)
        self._stop |= ray.get(self._board.push.remote(self._group, []))

    def _push(self) -> None:
        self._answer = self._board.push.remote(self._group, self._waiting)
        self._waiting, self._pushed_at = [], time.monotonic()

    def stop_requested(self) -> bool:
        """Only rank 0 asks; the loop tells the others."""
        import ray

        if self._rank == 0 and self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop |= ray.get(self._answer)
            self._answer = None
        return self._stop or (self._rank == 0 and self._pulse is not None and self._pulse.stop)

    def finish(self, summary: dict[str, Any] | None) -> None:
        import ray

        self._end_pulse()
        if summary is not None:
            last = self._board.push.remote(self._group, self._waiting)
            ray.get([last, self._board.finish.remote(self._group, summary)])

    def fail(self, error: Exception, workers: int) -> bool:
        """Tell the error that ends the run. True when every worker failed alike, so that none waits for another."""
        import ray

        self._end_pulse()
        last = self._board.push.remote(self._group, self._waiting)
        ray.get([last, self._board.fail.remote(self._group, error)])
        end = time.monotonic() + _ALIKE_SECONDS
        while time.monotonic() < end:
            if ray.get(self._board.failures.remote()) >= workers:
                return True
            time.sleep(0.05)
        return False

    def _end_pulse(self) -> None:
        if self._pulse:
            self._pulse.end()
            self._board.part.remote(self._group, self._rank)

    def crash(self, text: str) -> None:
        import ray

        self._end_pulse()
        ray.get(self._board.crash.remote(self._group, f"worker {self._rank}\n{text}"))
