"""Between a run's workers and its driver: an actor that passes events one way and wishes the other. No torch: it is
there before any worker is."""

from __future__ import annotations

import time
from typing import Any

_PUSH_SECONDS = 0.2
_HELD_SECONDS = 0.05
_ALIKE_SECONDS = 5.0
"""How long a worker that failed for good waits to hear that all others did too."""


class Board:
    """An actor between workers and driver: events one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._stop = False
        self._error: Exception | None = None
        self._failures = 0
        self._summary: dict[str, Any] | None = None
        self._crashes: list[str] = []
        self._begun = 0
        self._released = 0

    def begin(self) -> int:
        self._begun += 1
        return self._begun

    def push(self, events: list[dict[str, Any]]) -> bool:
        self._events += events
        return self._stop

    def may_go_on(self, step: int) -> bool:
        """Whether a run that waits after the evaluation of `step` need not wait any longer."""
        return self._stop or self._released >= step

    def drain(self, stop: bool, released: int = 0) -> list[dict[str, Any]]:
        self._stop |= stop
        self._released = max(self._released, released)
        events, self._events = self._events, []
        return events

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._failures += 1

    def failures(self) -> int:
        return self._failures

    def crash(self, text: str) -> None:
        self._crashes.append(text)

    def finish(self, summary: dict[str, Any]) -> None:
        self._summary = summary

    def outcome(self) -> dict[str, Any]:
        return {"error": self._error, "summary": self._summary, "crashes": self._crashes}


class BoardChannel:
    """A worker's end of the board: events go in batches, and no step waits for them."""

    def __init__(self, board: Any, rank: int, *, waits: bool = False) -> None:
        self._board, self._rank, self._waits = board, rank, waits
        self._waiting: list[dict[str, Any]] = []
        self._pushed_at = 0.0
        self._answer: Any = None
        self._stop = False

    def begin(self) -> int:
        """Groups of workers that began so far, this one included. For one worker of a group to ask."""
        import ray

        return ray.get(self._board.begin.remote())

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
        self._stop |= ray.get(self._board.push.remote([]))

    def _push(self) -> None:
        self._answer = self._board.push.remote(self._waiting)
        self._waiting, self._pushed_at = [], time.monotonic()

    def stop_requested(self) -> bool:
        """Only rank 0 asks; the loop tells the others."""
        import ray

        if self._rank == 0 and self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop |= ray.get(self._answer)
            self._answer = None
        return self._stop

    def finish(self, summary: dict[str, Any] | None) -> None:
        import ray

        if summary is not None:
            ray.get([self._board.push.remote(self._waiting), self._board.finish.remote(summary)])

    def fail(self, error: Exception, workers: int) -> bool:
        """Tell the error that ends the run. True when every worker failed alike, so that none waits for another."""
        import ray

        ray.get([self._board.push.remote(self._waiting), self._board.fail.remote(error)])
        end = time.monotonic() + _ALIKE_SECONDS
        while time.monotonic() < end:
            if ray.get(self._board.failures.remote()) >= workers:
                return True
            time.sleep(0.05)
        return False

    def has_failed(self) -> bool:
        import ray

        return ray.get(self._board.failures.remote()) > 0

    def crash(self, text: str) -> None:
        import ray

        ray.get(self._board.crash.remote(f"worker {self._rank}\n{text}"))
