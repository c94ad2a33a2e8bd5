"""Ray Tune's three questions: what next, is it over, and what just happened."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

_LAST_SECONDS = 300.0
"""How long trials may take to commit once the search is to end."""


class Proposals(Searcher):
    """The next trial, from the search's own books."""

    def __init__(self, hunt: Any) -> None:
        super().__init__()
        self._hunt = hunt

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes a snapshot that nobody reads."""
        return {}

    def suggest(self, trial_id: str) -> Any:
        found = self._hunt.suggest()
        if isinstance(found, dict):
            self._hunt.occupied.add(trial_id)
        return Searcher.FINISHED if found == "FINISHED" else found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._hunt.occupied.discard(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger is what a search goes on from."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        raise NotImplementedError

    def save(self, checkpoint_path: str) -> None:
        """Nothing."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


class Ending(Stopper):
    """Ends the experiment once all trials have left, or would not."""

    def __init__(self, hunt: Any) -> None:
        self._hunt = hunt

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._hunt.ended

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes a snapshot that nobody reads."""
        return {}


class Watch(Callback):
    """Frees the places of trials that Tune paused, stopped or lost, and passes the wish to end on."""

    def __init__(self, hunt: Any, desk: Any) -> None:
        self._hunt, self._desk = hunt, desk
        self._placed: dict[str, str] = {}
        """Tune's name of a trial that may have a place → ours."""
        self._told_at: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes a snapshot that nobody reads."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._placed[trial.trial_id] = f"{trial.config['index']:04d}"
        self._hunt.occupied.add(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for trial in trials:
            if trial.status not in ("RUNNING", "PENDING") and trial.trial_id in self._placed:
                self._hunt.occupied.discard(trial.trial_id)
                self._desk.leave.remote(self._placed.pop(trial.trial_id))
        if self._told_at is None and self._hunt.ending():
            self._told_at = time.monotonic()
            self._desk.stop.remote()
        if self._told_at is not None:
            busy = any(trial.status == "RUNNING" for trial in trials)
            self._hunt.ended = not busy or time.monotonic() - self._told_at > _LAST_SECONDS
