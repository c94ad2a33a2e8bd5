"""A worker's sign of life: a thread that tells the board, once a second, how far the loop has come. No torch.

It is a lease as well: a worker that cannot reach the board any more, or whose group is over, ends. Who writes into the
run's folder after it waits until that time has passed (`ftray.train.watch.wait_out`), so a node that was cut off, or
comes back, never writes beside those who took over.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""A worker that says nothing for so long hangs as a whole; one that hears nothing for so long ends itself. No less than
Ray bears of a node that does not answer (RAY_health_check_…: five times ten seconds, and the pauses between): a shorter
cut would cost a start of the workers though Ray had waited for them. No more than a run should stand still because the
machine that wrote its commits is gone."""


@dataclass(frozen=True)
class Life:
    """A worker as the board knows it."""

    rank: int
    node: str
    host: str
    pid: int
    born: float
    """When the process began; with the pid its name."""
    marks: int = 0
    """Steps forward that its loop made, of whatever size."""
    doing: str = "starting"
    silent: float = 0.0
    """Seconds since it said anything."""
    stuck: float = 0.0
    """Seconds since its last step forward."""

    def where(self) -> str:
        return f"worker {self.rank} (pid {self.pid} on {self.host})"


def hanging(lives: Iterable[Life], stall_seconds: float) -> tuple[Life, str] | None:
    """The worker that holds the others up, and why one thinks so; None while all go on.

    Silence counts always, standing still only once the loop has begun: a base may take long to load. Of workers that
    stand still the one behind all others is the cause, since they wait for it.
    """
    lives = list(lives)
    for life in lives:
        if life.silent >= min(SILENT_SECONDS, stall_seconds):
            return life, f"{life.where()} has given no sign of life for {life.silent:.0f} s; it was at {life.doing}"
    still = [life for life in lives if life.marks and life.stuck >= stall_seconds]
    if lives and len(still) == len(lives):
        last = min(still, key=lambda life: (life.marks, life.rank))
        return last, f"{last.where()} has made no progress for {last.stuck:.0f} s; it is at {last.doing}"
    return None


def myself(rank: int) -> Life:
    import ray

    node, pid = ray.get_runtime_context().get_node_id(), os.getpid()
    return Life(rank, node, ray.util.get_node_ip_address(), pid, birth(pid))


def birth(pid: int) -> float:
    """When a process began: by Linux in ticks since the machine started, which no setting of the clock changes. Raises
    psutil.NoSuchProcess."""
    import psutil

    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    except OSError:
        return psutil.Process(pid).create_time()


def lives(pid: int, born: float) -> bool:
    """Whether the process that began then still runs: not a later one of its number, nor one that is dead and was not
    taken leave of."""
    import psutil

    try:
        return birth(pid) == born and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_process(pid: int, born: float) -> bool:
    """Kill the process, stopped or not, if it is still the one that was meant; whether it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        if birth(pid) != born:
            return True
        process.kill()
        process.wait(timeout=5)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return not lives(pid, born)
    return True


class Pulse:
    """The thread of one worker."""

    def __init__(self, board: Any, group: int, rank: int) -> None:
        self._board, self._group, self._rank = board, group, rank
        self.marks, self.doing, self.stop = 0, "starting", False
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="ftray-pulse", daemon=True).start()

    def mark(self, doing: str) -> None:
        """The loop went a step forward, and is now at `doing`."""
        self.marks, self.doing = self.marks + 1, doing

    def end(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        import ray
        from ray.exceptions import RayError

        heard = time.monotonic()  # by the board: no later than this did it last hear of us
        while not self._ended.wait(BEAT_SECONDS):
            asked = time.monotonic()
            try:
                told = self._board.beat.remote(self._group, self._rank, self.marks, self.doing)
                answer = ray.get(told, timeout=max(0.0, heard + SILENT_SECONDS - asked))
                heard = asked
            except RayError:
                if time.monotonic() - heard < SILENT_SECONDS:
                    continue
                answer = "end"
            if answer == "end" and not self._ended.is_set():
                os._exit(1)  # not an exception: the loop may wait for others for ever
            self.stop |= answer == "stop"
