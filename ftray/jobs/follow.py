"""A job's log as it grows, through lost connections, until the job is over.

follower = Follower(cluster, "run-1a2b3c")
for kind, what in follower.events():
    …
"""

from __future__ import annotations

import asyncio
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ftray.errors import FtrayError, RunError
from ftray.jobs.cluster import Cluster, ConnectionLost, Job

SILENCE_SECONDS = 20.0
"""When the log is silent for so long, the job is asked after: a connection that was cut is silent too."""
LOST_SECONDS = 600.0
"""A job server that is away for so long is given up. The job goes on without us."""
_LONGEST_PAUSE = 15.0

Event = tuple[str, Any]
"""("text", str), ("lost", why), and last ("over", Job) or ("error", FtrayError)."""


class Follower(threading.Thread):
    """Reads on a thread of its own, so that the main thread is free for Ctrl-C."""

    def __init__(self, cluster: Cluster, job: str, *, lost_seconds: float = LOST_SECONDS) -> None:
        super().__init__(name="ftray-follow", daemon=True)
        self._cluster, self._job, self._lost_seconds = cluster, job, lost_seconds
        self._events: queue.Queue[Event] = queue.Queue(1000)
        self._seen = 0
        """Characters of the log that were handed on; after a lost connection it comes from the beginning again."""

    def events(self, wait: float = 0.5) -> Iterator[Event | None]:
        """Events as they come, None while there is none for `wait` seconds."""
        while True:
            try:
                event = self._events.get(timeout=wait)
            except queue.Empty:
                yield None
                continue
            yield event
            if event[0] in ("over", "error"):
                return

    def run(self) -> None:
        try:
            self._events.put(("over", asyncio.run(self._follow())))
        except FtrayError as error:
            self._events.put(("error", error))
        except BaseException as error:  # noqa: BLE001 - the main thread waits for a word
            self._events.put(("error", RunError(f"following the log failed: {type(error).__name__}: {error}")))

    async def _follow(self) -> Job:
        """The job, once it is over. Raises what the cluster says of it, ConnectionLost after `lost_seconds`."""
        lost_since: float | None = None
        pause = 1.0
        while True:
            before = self._seen
            why = await self._read()
            try:
                job = self._cluster.job(self._job)
                if job.is_over and not why:
                    return job
                if job.is_over:
                    self._rest()
                    return job
            except ConnectionLost as error:
                why = error.what
            now = time.monotonic()
            if self._seen > before:
                lost_since, pause = None, 1.0
            if why and lost_since is None:
                lost_since = now
                self._events.put(("lost", why))
            if lost_since is not None and now - lost_since > self._lost_seconds:
                raise ConnectionLost(
                    f"the job server has been away for {self._lost_seconds:.0f} s: {why}",
                    where=self._cluster.address,
                    hint=f"the job may well go on: `ftray runs logs -f {self._job}` follows it again",
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _rest(self) -> None:
        """What the log has beyond what was read, after the job is over and the connection was lost."""
        with suppress(FtrayError):  # a log that is gone with its host changes nothing about the outcome
            self._hand_on(self._cluster.logs(self._job), 0)

    async def _read(self) -> str:
        """Hand on the log until it ends or the connection is lost; returns why it was lost, if it was."""
        import aiohttp

        tail = self._cluster.tail(self._job)
        at, pending = 0, None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(tail))  # type: ignore[arg-type]
                done, _ = await asyncio.wait([pending], timeout=SILENCE_SECONDS)
                if not done:
                    if (await asyncio.to_thread(self._cluster.job, self._job)).is_over:
                        return "the log did not end with its job"
                    continue
                text, pending = pending.result(), None
                self._hand_on(text, at)
                at += len(text)
        except StopAsyncIteration:
            return ""
        except ConnectionLost as error:
            return error.what
        except aiohttp.WSServerHandshakeError as error:
            return f"the job server refused to show the log: {error.status} {error.message}"
        except (aiohttp.ClientError, OSError, RuntimeError, TimeoutError) as error:
            return f"the connection was lost: {' '.join(str(error).split())[:200] or type(error).__name__}"
        finally:
            if pending is not None:
                pending.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
                    await pending

    def _hand_on(self, text: str, at: int) -> None:
        """`text` begins at character `at` of the log; what was seen of it before is left out."""
        if new := text[max(0, self._seen - at) :]:
            self._seen += len(new)
            self._events.put(("text", new))


_OF_RAY = re.compile(
    r"^(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+INFO\s+(?:job_manager|worker)\.py:\d+ -- .*"
    r"|Running entrypoint for job .*|\[\d{4}-.*\] .*(?:rpc_chaos|gcs_rpc_client).*)$"
)


class OwnLines:
    """Leaves out the lines that Ray's job server and client begin a log with."""

    def __init__(self) -> None:
        self._rest = ""

    def __call__(self, text: str) -> str:
        """What of a further piece of the log is to be shown."""
        *lines, self._rest = (self._rest + text).split("\n")
        shown = "".join(f"{line}\n" for line in lines if not _OF_RAY.match(line))
        if self._rest and not _may_become_rays(self._rest):
            shown, self._rest = shown + self._rest, ""
        return shown

    def end(self) -> str:
        rest, self._rest = self._rest, ""
        return rest


def _may_become_rays(part: str) -> bool:
    return part[0] in "2[R" and len(part) < 2000
