"""A job's log, whole through lost connections. No Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from ftray.errors import RunError
from ftray.jobs import follow as follow_module
from ftray.jobs.cluster import ConnectionLost, Job
from ftray.jobs.follow import Follower, OwnLines


class Server:
    """A job server at its edge: each connection shows the log up to where it is cut, and the job ends with the last."""

    address = "http://head:8265"

    def __init__(self, text: str, cuts: list[int], silent: int = 0) -> None:
        self.text, self.cuts, self.silent = text, cuts, silent

    def job(self, job: str) -> Job:
        if self.silent:
            self.silent -= 1
            raise ConnectionLost("connection refused")
        return Job(job, "RUNNING" if self.cuts else "SUCCEEDED", exit_code=None if self.cuts else 0)

    def logs(self, job: str) -> str:
        return self.text

    async def tail(self, job: str) -> AsyncIterator[str]:
        cut = self.cuts.pop(0) if self.cuts else None
        text = self.text[:cut]
        for i in range(0, len(text), 7):
            yield text[i : i + 7]
        if cut is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "_LONGEST_PAUSE", 0.01)
    sleep = follow_module.asyncio.sleep
    monkeypatch.setattr(follow_module.asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.01)))


def followed(server: Server, **options: Any) -> tuple[str, list[str], Any]:
    follower = Follower(server, "a-1", **options)  # type: ignore[arg-type]
    follower.start()
    events = [event for event in follower.events(0.05) if event]
    return "".join(what for kind, what in events if kind == "text"), [kind for kind, _ in events], events[-1][1]


def test_a_log_is_whole_and_said_once_through_lost_connections(no_pause: None) -> None:
    text = "".join(f"step {i}\n" for i in range(40))
    shown, kinds, last = followed(Server(text, [10, 10, 33, 200], silent=2))
    assert shown == text
    assert kinds.count("lost") >= 1
    assert last.status == "SUCCEEDED"


def test_a_server_that_stays_away_is_given_up(no_pause: None) -> None:
    _, kinds, last = followed(Server("a\n", [1] * 10_000, silent=10**9), lost_seconds=0.3)
    assert kinds[-1] == "error"
    assert isinstance(last, RunError)
    assert "ftray runs logs -f a-1" in str(last)


def test_rays_own_lines_are_left_out() -> None:
    own = OwnLines()
    log = (
        "2026-11-21 20:00:00,001\tINFO job_manager.py:590 -- Runtime env is setting up.\n"
        "Running entrypoint for job a-1: ftray train run.yaml\n"
        "starting Ray\nRank 0\n"
        "2026-11-21 20:00:00,001\tINFO worker.py:1 -- Connecting to existing Ray cluster at address: 1.2.3.4:6379...\n"
        "2 warnings\nlast"
    )
    shown = "".join(own(log[i : i + 5]) for i in range(0, len(log), 5)) + own.end()
    assert shown == "starting Ray\nRank 0\n2 warnings\nlast"
