"""Trials that are ordinary runs: each a `ftray.train.launch.train` of its own, as many at once as there are places.

One Ray actor starts them all, with the methods of `ftray.tune.host`, so that a trial need not know which of the two it
follows. It holds no resources: the workers of its runs do, and a run begins only when all of them fit, in the order in
which trials came. So no run ever waits for a place that another run's worker has while that one waits for its own.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any

from ftray.config import Run
from ftray.errors import FtrayError, RunError, RunStopped
from ftray.train import commits
from ftray.train.launch import gpus_of_a_worker, train
from ftray.tune.desk import NotHere

Places = dict[str, float]
"""Ray resources by name: CPU, GPU."""


def places_of(run: Run) -> Places:
    """What all workers of a run take. `workers.cpus` null: one CPU a worker, so that other trials find places too."""
    gpus = gpus_of_a_worker(run)
    cpus = run.workers.cpus or 1
    return {"CPU": cpus * run.workers.most} | ({"GPU": gpus * run.workers.most} if gpus else {})


def fits(need: Places, free: Places) -> bool:
    return all(amount <= free.get(name, 0) + 1e-9 for name, amount in need.items())


class _Job:
    """One run in a thread of its own, as the event loop sees it."""

    def __init__(self, run: Run, need: Places, waits: bool) -> None:
        self.run, self.need, self.waits = run, need, waits
        self.stop = threading.Event()
        self.events: asyncio.Queue[dict[str, Any] | Exception] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.released = -1
        """Step of the last evaluation that was judged."""
        self.judging = -1


class Ordinary:
    """An async actor. `folder`: the user's, where paths begin. `places`: what runs may take, all together; `smallest`:
    what the smallest of them takes."""

    def __init__(self, folder: str, places: Places, smallest: Places, verbose: bool = False) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)
        from transformers import AutoTokenizer  # noqa: F401 - loaded lazily, and not safe for the threads to come

        self._free, self._smallest, self._verbose = dict(places), smallest, verbose
        self._jobs: dict[str, _Job] = {}
        self._turn = asyncio.Lock()
        self._changed = asyncio.Condition()

    async def join(self, trial: str, run: dict[str, Any], *, waits: bool, source: str | None = None) -> None:
        """Start the run, or go on with it, once its workers have places. Raises FtrayError."""
        if source is not None:
            raise RunError("only a lane can go on from another trial's weights", where=f"trial {trial}")
        config = Run.model_validate(run)
        job = _Job(config, places_of(config), waits)
        if config.workers.cpus is None:
            workers = config.workers.model_copy(update={"cpus": 1.0})
            job.run = config.model_copy(update={"workers": workers})
        async with self._turn:  # first come, first served: a large run is not starved by small ones
            async with self._changed:
                await self._changed.wait_for(lambda: fits(job.need, self._free))
            self._take(job.need, -1)
        self._jobs[trial] = job
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._run, args=(trial, job, loop), name=f"trial {trial}", daemon=True).start()

    def _take(self, need: Places, sign: int) -> None:
        for name, amount in need.items():
            self._free[name] = self._free.get(name, 0) + sign * amount

    def _run(self, trial: str, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        def tell(event: dict[str, Any] | Exception) -> None:
            loop.call_soon_threadsafe(job.events.put_nowait, event)

        def on_event(event: dict[str, Any]) -> None:
            if event["kind"] == "evaluation":
                tell(event)

        try:
            released = (lambda: job.released) if job.waits else None
            summary = train(job.run, on_event=on_event, stop=job.stop, verbose=self._verbose, released=released)
            tell({"kind": "end", "summary": summary})
        except RunStopped as error:
            tell(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the trial is told
            tell(error if isinstance(error, FtrayError) else RunError(f"the run failed: {error!r}"))
        finally:
            asyncio.run_coroutine_threadsafe(self._end(job), loop)

    async def _end(self, job: _Job) -> None:
        async with self._changed:
            self._take(job.need, 1)
            job.ended.set()
            self._changed.notify_all()

    async def next(self, trial: str) -> dict[str, Any]:
        """The run's next evaluation, or its end. Raises the run's own error."""
        job = self._job(trial)
        job.released = job.judging
        event = await job.events.get()
        if isinstance(event, Exception):
            raise event
        if event["kind"] == "evaluation":
            job.judging = event["step"]
        return event

    async def commit(self, trial: str) -> str:
        """Commit, and end the run: it goes on from there when the trial joins again. The commit's folder."""
        job = self._job(trial)
        await self._stop(job)
        steps = commits.steps_of(job.run.folder)
        return commits.place_of(job.run.folder, steps[-1]) if steps else ""

    async def stop(self, trial: str) -> None:
        """Have the run commit and end."""
        self._job(trial).stop.set()

    async def leave(self, trial: str) -> None:
        """End the run between steps, without an artefact. Unknown names are ignored."""
        if job := self._jobs.pop(trial, None):
            await self._stop(job)

    async def _stop(self, job: _Job) -> None:
        job.stop.set()
        await job.ended.wait()

    async def load(self) -> dict[str, int]:
        """Runs that have places, and how many more of the smallest would find some."""
        free, room = dict(self._free), 0
        while room < 1000 and fits(self._smallest, free):
            for name, amount in self._smallest.items():
                free[name] -= amount
            room += 1
        return {"lanes": sum(not job.ended.is_set() for job in self._jobs.values()), "room": room}

    def _job(self, trial: str) -> _Job:
        if trial not in self._jobs:
            raise NotHere("no such trial runs here", where=f"trial {trial}")
        return self._jobs[trial]
