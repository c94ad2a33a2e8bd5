"""Ray Tune's schedulers, with the ledger in front: what a trial reports is written before the scheduler judges it, and
what it decided holds when the search is taken up again.

A trial that is replayed reports again what the ledger has. The scheduler sees it all, and so knows afterwards what it
knew before; its own verdict on a replayed result counts only where it pauses trials or changes them (HyperBand).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pbt import _PBTTrialState

from ftray.config.search import PBT, Asha, HyperBand, Median, Search
from ftray.train.seeds import mix
from ftray.tune.ledger import Ledger

TIME = "step"
WORST = 1e9
"""Stands for a loss that is not finite: schedulers take percentiles, which know no infinity."""

Emit = Callable[[dict[str, Any]], None]


def scheduler_of(search: Search, evaluate_every: int, steps: int) -> Any:
    """Ray Tune's scheduler as the search file asks for. `evaluate_every` and `steps` are those of the run, in steps."""
    knobs = search.scheduler
    judged: dict[str, Any] = {"time_attr": TIME, "metric": search.metric[0], "mode": search.modes[0]}
    if isinstance(knobs, Asha):
        grace = knobs.grace or evaluate_every
        most = max(steps, grace)
        return AsyncHyperBandScheduler(
            max_t=most, grace_period=grace, reduction_factor=knobs.reduction, brackets=knobs.brackets,
            stop_last_trials=False, **judged,
        )  # fmt: skip
    if isinstance(knobs, HyperBand):
        return HyperBandScheduler(max_t=knobs.max_steps or steps, reduction_factor=knobs.reduction, **judged)
    if isinstance(knobs, Median):
        return MedianStoppingRule(
            grace_period=knobs.grace or evaluate_every,
            min_samples_required=knobs.trials,
            min_time_slice=10**12,
            **judged,
        )  # fmt: skip - a trial that waits for others to be judged by gains nothing from pausing
    if isinstance(knobs, PBT):
        return _Population(
            perturbation_interval=knobs.interval or evaluate_every,
            quantile_fraction=knobs.quantile,
            resample_probability=knobs.resample,
            hyperparam_mutations={"parameters": {key: _mutation(p) for key, p in search.space.items()}},
            custom_explore_fn=lambda config: _within(config, search),
            log_config=False,
            **judged,
        )
    return FIFOScheduler()


def _mutation(parameter: Any) -> Any:
    if parameter.values is not None:
        return list(parameter.values)
    low, high = parameter.bounds
    if parameter.kind == "loguniform":
        return lambda: math.exp(random.uniform(math.log(low), math.log(high)))
    return lambda: random.uniform(low, high)


def _within(config: dict[str, Any], search: Search) -> dict[str, Any]:
    """A changed configuration, back inside the space where a factor led out of it."""
    for key, parameter in search.space.items():
        if parameter.values is None and parameter.bounds is not None:
            low, high = parameter.bounds
            config["parameters"][key] = min(max(config["parameters"][key], low), high)
    return config


class _Population(PopulationBasedTraining):
    """Tune's, for trials that a searcher proposes: what they start from is decided and recorded there."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._trial_state[trial] = _PBTTrialState(trial)


class Recorded(TrialScheduler):
    """The ledger in front of one of Tune's schedulers."""

    def __init__(self, inner: Any, search: Search, ledger: Ledger, on_event: Emit) -> None:
        super().__init__()
        self._inner, self._search, self._ledger, self._on_event = inner, search, ledger, on_event
        self._replayed = {trial.index: trial.step for trial in ledger.trials}
        """Steps up to which reports are known."""
        self._stopped = {trial.index for trial in ledger.trials if trial.state == "stopped"}
        self._seen: dict[int, int] = {}
        """Step of the newest report of each trial that the scheduler saw in this process."""
        self._configs: dict[str, dict[str, Any]] = {}
        """Tune's name of a trial → its configuration. Population based training gives it another's, number and all."""
        self._ended: set[int] = set()
        self._pauses = isinstance(inner, HyperBandScheduler | PopulationBasedTraining)
        self._supports_buffered_results = False

    # ------------------------------------------------------------------------------------------------ Tune's interface

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes a snapshot that nobody reads."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        if trial.trial_id in self._configs:  # its actor was lost, and it goes on in another
            return
        self._configs[trial.trial_id] = trial.config
        index = self._index(trial)
        with drawing(self._search.seed, index):  # which bracket it comes to is a function of its number
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        index = self._index(trial)
        if result.get("retry"):
            self._ledger.write("fail", index=index, error=result["retry"], aside=False)
            self._on_event({"kind": "trial_failed", "index": index, "error": result["retry"], "aside": False})
            return self.CONTINUE
        step = result[TIME]
        if step <= self._seen.get(index, 0):  # made again after its actor was lost
            return self.CONTINUE
        self._seen[index] = step
        if step <= self._replayed.get(index, 0):
            return self._judge_again(tune_controller, trial, result)
        self._record(index, result)
        with drawing(self._search.seed, index, step):  # and so is what a trial is changed to
            decision = self._inner.on_trial_result(tune_controller, trial, finite(result, self._search))
        self._note_changes(tune_controller)
        if decision == self.STOP:
            self._stop(index, step)
        return decision

    def _judge_again(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        index, step = self._index(trial), result[TIME]
        last = step == self._replayed[index]
        if last and index in self._stopped:
            if not self._pauses:
                self._inner.on_trial_result(tune_controller, trial, finite(result, self._search))
            self._ended.add(index)
            return self.STOP
        if isinstance(self._inner, PopulationBasedTraining):
            state = self._inner._trial_state[trial]  # who changed whom is in the ledger: only the standing is needed
            self._inner._save_trial_state(state, step, finite(result, self._search), trial)
            state.last_perturbation_time = step
            return self.CONTINUE
        decision = self._inner.on_trial_result(tune_controller, trial, finite(result, self._search))
        if not self._pauses:
            if isinstance(self._inner, MedianStoppingRule):
                self._inner._stopped_trials.discard(trial)  # it went on, and so must be judged again
            return self.CONTINUE
        if decision == self.STOP:
            self._stop(index, step)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        index = self._index(trial)
        if result.get("interrupted"):
            return
        known = self._ledger.trials[index]
        if known.state == "open":
            if result.get("failed"):
                self._ledger.write("fail", index=index, error=result["failed"], aside=True)
                self._on_event({"kind": "trial_failed", "index": index, "error": result["failed"], "aside": True})
            elif "summary" in result:
                if result.get(TIME, 0) > known.step:
                    self._record(index, result)
                summary = json.loads(result["summary"])
                self._ledger.write("finish", index=index, summary=summary)
                self._on_event({"kind": "trial_finished", "index": index, "summary": summary})
            elif index not in self._ended:  # HyperBand ended it while it was being saved
                self._stop(index, known.step)
        self._ended.add(index)
        if result.get("failed") or TIME not in result:
            self._inner.on_trial_error(tune_controller, trial)
        else:
            self._inner.on_trial_complete(tune_controller, trial, finite(result, self._search))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        index = self._index(trial)
        if self._ledger.trials[index].state == "open":
            self._stop(index, self._ledger.trials[index].step)
        self._ended.add(index)
        self._inner.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Its actor was lost. While Tune starts another the scheduler need not know."""
        index = self._index(trial)
        if trial.should_recover():
            self._on_event({"kind": "trial_lost", "index": index})
            return
        error = "its Ray Tune actor was lost again and again"
        self._ledger.write("fail", index=index, error=error, aside=True)
        self._on_event({"kind": "trial_failed", "index": index, "error": error, "aside": True})
        self._inner.on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return self._inner.debug_string()

    # ------------------------------------------------------------------------------------------------------- the ledger

    def _record(self, index: int, result: dict[str, Any]) -> None:
        kept = reported(result)
        self._ledger.write("result", index=index, **kept)
        self._on_event({"kind": "trial_result", "index": index, **kept})

    def _stop(self, index: int, step: int) -> None:
        self._ended.add(index)
        if self._ledger.trials[index].state != "open":
            return
        self._ledger.write("stop", index=index, step=step)
        self._on_event({"kind": "trial_stopped", "index": index, "step": step})

    def _note_changes(self, tune_controller: Any) -> None:
        """What population based training changed, and from whose weights the trial goes on."""
        if not isinstance(self._inner, PopulationBasedTraining):
            return
        for trial in tune_controller.get_trials():
            mine = self._configs[trial.trial_id]
            source = trial.config["index"]
            if source == mine["index"]:
                continue
            known, parameters = self._ledger.trials[mine["index"]], trial.config["parameters"]
            at = next(s for t, s in self._inner._trial_state.items() if self._index(t) == source).last_train_time
            if known.state == "open":
                told = {"parameters": parameters, "step": known.step, "source": source, "source_step": at}
                self._ledger.write("change", index=known.index, **told)
                self._on_event({"kind": "trial_changed", "index": known.index, "parameters": parameters})
            for steps in (self._seen, self._replayed):  # what it reports from here on is new
                steps[known.index] = min(steps.get(known.index, 0), at)
            trial.config = self._configs[trial.trial_id] = mine | {
                "parameters": parameters,
                "changes": len(known.changes),
                "source": None,  # Tune's checkpoint says
                "replay": json.dumps(known.results),
            }

    def _index(self, trial: Any) -> int:
        return self._configs[trial.trial_id]["index"]


@contextmanager
def drawing(*seed: int) -> Iterator[None]:
    """What is drawn at random inside, by Tune's schedulers too, is a function of these numbers."""
    states = random.getstate(), np.random.get_state()
    random.seed(mix(*seed))
    np.random.seed(mix(*seed) % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def reported(result: dict[str, Any]) -> dict[str, Any]:
    """What the ledger keeps of a report."""
    names = (TIME, "loss", "perplexity", "accuracy", "margin", "trained_tokens", "seconds")
    return {name: result[name] for name in names if name in result}


def finite(result: dict[str, Any], search: Search) -> dict[str, Any]:
    """A report that a scheduler can compare: what is not finite becomes the worst there is."""
    name, mode = search.metric[0], search.modes[0]
    value = result.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
        return result
    return result | {name: WORST if mode == "min" else -WORST}
