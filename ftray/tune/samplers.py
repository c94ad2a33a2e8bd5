"""What to try next. Random and grid are pure functions of (seed, index); Optuna's proposal also depends on the results
so far, and is recorded before it is used."""

from __future__ import annotations

import json
import warnings
from typing import Any, Protocol

from ftray.config.search import OptunaSampler, Parameter, Search
from ftray.train.seeds import mix
from ftray.tune.ledger import Trial
from ftray.tune.space import Parameters, draw, finite, grid, per_sample

_DIFFERENT = 10_000
"""Trials of a space that is gone through without repetition; in a larger one few draws are alike."""
_ATTEMPTS = 64
"""Draws for each trial of such a space before one is made again: the chance to miss the last new one is e^-64."""


class Sampler(Protocol):
    def propose(self, index: int, trials: list[Trial]) -> Parameters:
        """What trial `index` tries; `trials` are those before it, as far as they have come."""


class RandomSearch:
    """Of a space that has an end nothing is drawn twice before all of it has been: 32 draws of 32 combinations would
    miss 12 of them, and train as many again. With `grid` keys at least one trial of each sample is a new one."""

    def __init__(self, search: Search) -> None:
        self._search, self._each = search, per_sample(search)
        self._different = finite(search, _DIFFERENT)
        self._drawn: list[Parameters] = []
        self._tried: set[str] = set()

    def propose(self, index: int, trials: list[Trial]) -> Parameters:
        while len(self._drawn) <= index:
            self._drawn += self._sample(len(self._drawn))
        return self._drawn[index]

    def _sample(self, first: int) -> list[Parameters]:
        """The trials of the next sample, one of them at least a new one."""
        if self._different is not None and len(self._tried) >= self._different:
            self._tried.clear()
        for attempt in range(_ATTEMPTS * (self._different or 1)):
            sample = [draw(self._search, first + i, attempt) for i in range(self._each)]
            told = {json.dumps(parameters, sort_keys=True) for parameters in sample}
            if self._different is None or not told <= self._tried:
                break
        self._tried |= told
        return sample


class GridSearch:
    def __init__(self, search: Search) -> None:
        self._grid = grid(search)

    def propose(self, index: int, trials: list[Trial]) -> Parameters:
        return self._grid[index]


class OptunaSearch:
    """TPE over the ledger: each proposal comes from a study made of what is known by then, with a seed of its own, so
    that a search of one trial at a time proposes as if it had not been broken off. One that is still running keeps
    others from its place."""

    def __init__(self, search: Search) -> None:
        self._search = search
        assert isinstance(search.sampler, OptunaSampler)
        self._knobs = search.sampler

    def propose(self, index: int, trials: list[Trial]) -> Parameters:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        knobs, modes = self._knobs, self._search.modes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=mix(self._search.seed, index) % 2**32,
                n_startup_trials=knobs.startup,
                n_ei_candidates=knobs.candidates,
                multivariate=knobs.multivariate,
                group=knobs.multivariate,  # conditional keys: each set of keys by itself
                constant_liar=True,
            )
        study = optuna.create_study(
            sampler=sampler, directions=["minimize" if mode == "min" else "maximize" for mode in modes]
        )
        for trial in trials:
            study.add_trial(self._told(trial))
        asked, parameters = study.ask(), Parameters()
        for key in self._search.keys:
            if self._search.is_active(key, parameters):
                parameters[key] = _ask(asked, key, self._search.space[key])
        return parameters

    def _told(self, trial: Trial) -> Any:
        import optuna

        space = {key: _distribution(self._search.space[key]) for key in trial.parameters if key in self._search.space}
        values = {key: _stored(self._search.space[key], trial.parameters[key]) for key in space}
        scores = trial.scores(self._search)
        state, told = optuna.trial.TrialState.RUNNING, None
        if trial.state == "aside" or (trial.state != "open" and scores is None):
            state = optuna.trial.TrialState.FAIL
        elif scores is not None and trial.state != "open":
            state, told = optuna.trial.TrialState.COMPLETE, scores
        return optuna.trial.create_trial(state=state, params=values, distributions=space, values=told)


def _ask(trial: Any, key: str, parameter: Parameter) -> Any:
    values = parameter.values
    if parameter.kind in ("choice", "grid"):
        assert values is not None
        return values[trial.suggest_categorical(key, list(range(len(values))))]
    assert parameter.bounds is not None
    low, high = parameter.bounds
    if parameter.kind == "integers":
        return trial.suggest_int(key, int(low), int(high), step=int(parameter.step or 1))
    return trial.suggest_float(key, low, high, log=parameter.kind == "loguniform", step=parameter.step)


def _distribution(parameter: Parameter) -> Any:
    import optuna.distributions as kinds

    if parameter.kind in ("choice", "grid"):
        assert parameter.values is not None
        return kinds.CategoricalDistribution(list(range(len(parameter.values))))
    assert parameter.bounds is not None
    low, high = parameter.bounds
    if parameter.kind == "integers":
        return kinds.IntDistribution(int(low), int(high), step=int(parameter.step or 1))
    return kinds.FloatDistribution(low, high, log=parameter.kind == "loguniform", step=parameter.step)


def _stored(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna holds it: of listed ones its place, since they may be of any kind."""
    if parameter.kind in ("choice", "grid"):
        assert parameter.values is not None
        return next(i for i, v in enumerate(parameter.values) if json.dumps(v) == json.dumps(value))
    return value


def sampler_of(search: Search) -> Sampler:
    kinds: dict[str, type[Any]] = {"random": RandomSearch, "grid": GridSearch, "optuna": OptunaSearch}
    return kinds[search.sampler.name](search)
