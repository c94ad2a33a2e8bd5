"""A trial: a light Ray Tune actor that follows one lane, or one run, on a worker elsewhere. It imports no torch."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.tune import Trainable

from ftray.config.search import Search
from ftray.errors import FtrayError, UserError
from ftray.manifest import read_text, write_text
from ftray.session import cause_of
from ftray.tune.desk import NotHere
from ftray.tune.ledger import SOURCE, changes_made

_LOST_WORKERS = 8
"""Times that a trial may lose its worker, and the trials with it, before it counts as the trial's failure."""


class Interrupted(Exception):
    """The search is to end."""


class Follower(Trainable):
    """`config`: index, parameters, kind (`lanes` or `runs`), steps, failures so far, the results that the ledger has
    (replayed first), how the trial ended if it has, how often population based training changed it, and a commit of
    another trial that it is to go on from.

    Each step of Tune's is an evaluation. The last one comes with the run's summary; a failure is a report too, so that
    the ledger has it before anything is tried again.
    """

    def setup(self, config: dict[str, Any], search: Search | None = None, desk: Any = None) -> None:
        assert search is not None
        self._search, self._desk = search, desk
        self._stopped = desk.stopped.remote()
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._index: int = config["index"]
        self._name = f"{self._index:04d}"
        self._kind: str = config["kind"]
        self._parameters: dict[str, Any] = config["parameters"]
        self._steps: int = config["steps"]
        self._failures: int = config["failures"]
        self._ended: str = config["ended"]
        self._replay: list[dict[str, Any]] = json.loads(config["replay"])
        self._last: dict[str, Any] = {}
        self._seat: Any = None
        self._unreported: list[dict[str, Any]] | None = None
        self._changes: int = config["changes"]
        self._source: str | None = config["source"] if self._change_is_due() else None
        self._lost = 0

    def step(self) -> dict[str, Any]:
        if self._replay:
            self._last = self._replay.pop(0)
            done = self._ended == "finished" and not self._replay
            return self._last | ({"summary": "{}", "done": True} if done else {})
        if self._ended in ("finished", "aside"):
            return self._last | {"failed": "set aside before", "done": True}
        try:
            return self._next_report()
        except Interrupted:
            self._leave_with_a_commit()
            return self._last | {"interrupted": True, "done": True}
        except FtrayError as error:
            return self._failed(str(error), final=isinstance(error, UserError))
        except RayError as error:
            return self._failed(f"a worker was lost {_LOST_WORKERS} times: {error}", final=True)

    def _next_report(self) -> dict[str, Any]:
        while True:
            event = self._next_event()
            if event["kind"] == "end":
                if event["summary"].get("reason") == "stopped":
                    raise Interrupted
                return self._last | {"summary": json.dumps(event["summary"]), "done": True}
            if event["step"] <= self._last.get("step", 0):  # the base's, or one that was told before
                continue
            self._last = {key: value for key, value in event.items() if key not in ("kind", "target_tokens", "time")}
            if event["step"] >= self._steps:
                continue  # the end follows, and is told with it
            return self._last

    def _next_event(self) -> dict[str, Any]:
        """The next event of the lane or run, wherever it is by now. Raises FtrayError, Interrupted, RayError."""
        while True:
            try:
                if self._seat is None:
                    if self._unreported is None:
                        # of weights that it is to give up nobody need hear
                        self._unreported = self._evaluations() if self._source is None else []
                    if self._unreported:
                        return self._unreported.pop(0)
                    run = self._search.run_of(self._parameters, self._index)
                    self._seat = self._get(self._desk.attach.remote(self._name, run.dump(), self._kind, self._source))
                    self._note_source()
                return self._get(self._seat.next.remote(self._name))
            except (RayActorError, NotHere):
                self._seat = self._unreported = None
                self._lost += 1
                if self._lost > _LOST_WORKERS:
                    raise

    def _evaluations(self) -> list[dict[str, Any]]:
        """Evaluations in the run's own metrics that nobody heard of: a worker may be lost, or the search ended, between
        a commit and what it had to tell. The run, going on from that commit, would not make them again."""
        try:
            lines = read_text(f"{self._folder}/metrics.jsonl").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        events = [json.loads(line) for line in lines if line.endswith("\n") and '"evaluation"' in line]
        newest = {event["step"]: event for event in events if event["kind"] == "evaluation"}
        return [newest[step] for step in sorted(newest) if step > self._last.get("step", 0)]

    def _get(self, answer: Any) -> Any:
        ready, _ = ray.wait([answer, self._stopped], num_returns=1)
        if answer not in ready:
            raise Interrupted
        try:
            return ray.get(answer)
        except RayError as error:
            raise cause_of(error) from None

    def _failed(self, error: str, *, final: bool) -> dict[str, Any]:
        self._desk.leave.remote(self._name)
        self._seat = self._unreported = None
        if final or self._failures >= self._search.retries:
            return self._last | {"failed": error, "done": True}
        self._failures += 1
        return self._last | {"retry": error}

    def _leave_with_a_commit(self) -> None:
        """Whatever happened to the worker by now, older commits are whole."""
        if self._seat is not None:
            with suppress(RayError, FtrayError):
                ray.get(self._seat.stop.remote(self._name))
                while ray.get(self._seat.next.remote(self._name))["kind"] != "end":
                    pass  # an evaluation in between is told when the search is taken up again
            self._seat = None

    # ------------------------------------------------------------------------------- pauses, and weights from another

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        with suppress(Interrupted, RayError, FtrayError):
            if self._seat is not None:
                return {"trial": self._name, "commit": self._get(self._seat.commit.remote(self._name))}
        return {"trial": self._name, "commit": self._last_commit()}

    def _last_commit(self) -> str | None:
        """Of the evaluation that was told last, for others that go on from it; each is told once its commit counts."""
        if self._search.scheduler.name != "pbt":
            return None
        from ftray.train import commits  # torch with it: where there is no worker to ask, which is rare

        with suppress(FtrayError):
            if (step := self._last.get("step")) in commits.steps_of(self._folder):
                return commits.place_of(self._folder, step)
        return None

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Its own: the trial's folder has it anyway. Another's: population based training, once a change."""
        if checkpoint and checkpoint["trial"] != self._name and self._change_is_due():
            self._source = checkpoint["commit"]

    def _change_is_due(self) -> bool:
        return self._changes > 0 and changes_made(self._folder) < self._changes

    @property
    def _folder(self) -> str:
        return self._search.trial_folder(self._index)

    def _note_source(self) -> None:
        if self._source is not None:
            told = {"commit": self._source, "changes": self._changes}
            write_text(f"{self._folder}/{SOURCE}", json.dumps(told) + "\n")
            self._source = None

    def cleanup(self) -> None:
        """Tune ends the actor; the driver has given up the trial's place by then, or will."""
