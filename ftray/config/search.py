"""What a search is: the search file, strict and complete. No torch, no Ray.

    search = load_search("rates.yaml", overrides=["samples=16"])

A run, a space over any of its keys, and how to look through it. `search.run_of(parameters, index)` is the run of one
trial, checked as any run file is.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from ftray.config import methods
from ftray.config.explain import explain
from ftray.config.reading import load_raw, override, parse_yaml, search_recipe, search_recipe_names, validated
from ftray.config.run import Run
from ftray.config.strict import Strict, by_name
from ftray.config.training import OWNERS, SHAPED
from ftray.errors import ConfigError
from ftray.manifest import join, read_text

KINDS = ("choice", "grid", "uniform", "loguniform", "integers")
METRICS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "perplexity": "min",
    "accuracy": "max",
    "margin": "max",
    "memory": "min",
    "trained": "min",
}
"""What a search may judge by, and which way is better. `loss`, `perplexity` and, of preferences, `accuracy` and
`margin` are the held-out rows'; `memory` (GiB of a worker) and `trained` (parameters) are the memory plan's."""
PLANNED = ("memory", "trained")
"""Metrics that are known before a trial starts, and do not change while it runs."""

IN_FLIGHT = (
    "train.learning_rate",
    "train.schedule",
    "train.betas",
    "train.epsilon",
    "train.weight_decay",
    "train.clip_norm",
    "train.label_smoothing",
    "method.dropout",
)
"""Keys, and sections, that may change while a run goes on from a commit: the weights stay what they were, in shape and
in what they compute, and so do the rows. Scheduler `pbt` changes these alone."""
_NOT_IN_FLIGHT = {
    "this key decides which weights there are, of which shapes": (
        "method.name",
        "method.rank",
        "method.rank_pattern",
        "method.targets",
    ),
    "another value of this key makes another update of the same weights": (
        "method.alpha",
        "method.alpha_pattern",
        "method.rslora",
    ),
    "this key decides which rows come when": ("seed", "data", "train.batch_rows"),
    "this key decides how long a trial is": ("train.steps", "train.epochs"),
    "lanes of one base have this key in common": ("model", "train.precision", "train.gradient_checkpointing"),
}

_Pair = tuple[float, float]


class Parameter(Strict):
    """What one key of the run may be. Exactly one of choice, grid, uniform, loguniform and integers."""

    choice: list[Any] | None = Field(None, min_length=1)
    """One of these values, whatever they are: numbers, words, lists, whole mappings."""
    grid: list[Any] | None = Field(None, min_length=1)
    """Every one of these values: with sampler `random`, each sample is tried with each of them."""
    uniform: _Pair | None = None
    """A number between these two."""
    loguniform: _Pair | None = None
    """A number between these two, both above 0, even in its logarithm."""
    integers: tuple[int, int] | None = None
    """A whole number between these two, both included."""
    step: float | None = Field(None, gt=0)
    """Of `uniform` and `integers`: only the lower bound and whole steps from it."""
    when: dict[str, Any] = {}
    """Key of the run → the value, or list of values, that it must have; else this key stays as the run has it. For what
    one method has and another has not: `{method.name: [lora, dora]}`."""

    @model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}{f', not {len(kinds)}' if kinds else ''}")
        if self.bounds is not None:
            low, high = self.bounds
            if low >= high:
                raise ValueError(f"{self.kind} [{low:g}, {high:g}]: the first must be below the second")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError(f"loguniform [{low:g}, {high:g}]: both must be above 0")
        if self.step is not None and self.kind not in ("uniform", "integers"):
            raise ValueError(f"step belongs to uniform and integers, not to {self.kind}")
        if self.step is not None and self.kind == "integers" and self.step != int(self.step):
            raise ValueError(f"step {self.step:g} of integers is no whole number")
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """(lowest, highest) of a range, None for listed values."""
        return self.uniform or self.loguniform or self.integers

    @property
    def values(self) -> list[Any] | None:
        """All values there are, in order; None for a continuous range."""
        if self.bounds is None:
            return self.choice if self.choice is not None else self.grid
        low, high = self.bounds
        if self.kind == "integers":
            return list(range(int(low), int(high) + 1, int(self.step or 1)))
        if self.step is None:
            return None
        return [low + i * self.step for i in range(int((high - low) / self.step + 1e-9) + 1)]


class RandomSampler(Strict):
    """Every sample drawn by itself, as a pure function of (seed, number)."""

    name: Literal["random"]


class GridSampler(Strict):
    """Every combination of all values, the last key changing fastest. `samples` is not used."""

    name: Literal["grid"]


class OptunaSampler(Strict):
    """Tree-structured Parzen estimator (Bergstra et al. 2011): later samples learn from earlier results. With several
    metrics it looks for the best trade-offs (Ozaki et al. 2022)."""

    name: Literal["optuna"]
    startup: int = Field(10, ge=1)
    """Random samples before it learns."""
    candidates: int = Field(24, ge=1)
    """Draws of which each time the most promising is taken."""
    multivariate: bool = True
    """Look at the parameters together, not each by itself."""


Sampler = Annotated[Union[RandomSampler, GridSampler, OptunaSampler], Field(discriminator="name")]  # noqa: UP007


class Fifo(Strict):
    """Every trial runs to its end."""

    name: Literal["fifo"]


class Asha(Strict):
    """Asynchronous successive halving (Li et al. 2020): at each rung the worse ones are stopped."""

    name: Literal["asha"]
    grace: int | None = Field(None, ge=1)
    """Steps of the first rung; null: the run's `train.evaluate_every`."""
    reduction: float = Field(3, gt=1)
    """Each rung has this many times the steps of the one before, and about one in so many goes on from it."""
    brackets: int = Field(1, ge=1)
    """More than 1: some trials start at later rungs."""


class HyperBand(Strict):
    """HyperBand (Li et al. 2018): successive halving in brackets, whose trials wait for each other."""

    name: Literal["hyperband"]
    reduction: float = Field(3, gt=1)
    """One in so many goes on from each halving."""
    max_steps: int | None = Field(None, ge=1)
    """Steps of the longest trial; null: the run's `train.steps`."""


class Median(Strict):
    """Stop a trial whose best value is worse than the median of the others' running means (Golovin et al. 2017)."""

    name: Literal["median"]
    grace: int | None = Field(None, ge=1)
    """Steps before a trial may be stopped; null: the run's `train.evaluate_every`."""
    trials: int = Field(3, ge=1)
    """Other trials that must have come as far."""


class PBT(Strict):
    """Population based training (Jaderberg et al. 2017): from time to time the worst trials go on from the best ones'
    weights, with changed parameters. For trials that are lanes, and keys that a commit can go on with: rate, schedule,
    betas, epsilon, weight decay, clipping, label smoothing, dropout."""

    name: Literal["pbt"]
    interval: int | None = Field(None, ge=1)
    """Steps between changes; null: the run's `train.evaluate_every`."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of trials that are the worst, and the best."""
    resample: float = Field(0.25, ge=0, le=1)
    """Chance that a parameter is drawn anew instead of changed."""


Scheduler = Annotated[Union[Fifo, Asha, HyperBand, Median, PBT], Field(discriminator="name")]  # noqa: UP007


class Budget(Strict):
    """When the whole search ends, whatever its trials have left; null: no such bound."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps of all trials together."""
    target_tokens: int | None = Field(None, ge=1)
    """Target tokens trained on, of all trials together."""
    minutes: float | None = Field(None, gt=0)
    """Time, that of earlier parts of the search included."""


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_SamplerOrName = Annotated[Sampler, BeforeValidator(by_name, json_schema_input_type=Sampler | str)]
_SchedulerOrName = Annotated[Scheduler, BeforeValidator(by_name, json_schema_input_type=Scheduler | str)]
_Mode = Literal["min", "max"]
_Names = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=list[str] | str)]
_Modes = Annotated[list[_Mode], BeforeValidator(_listed, json_schema_input_type=list[_Mode] | _Mode)]


def _dotted(space: Any, prefix: str = "") -> Any:
    """Nested keys of a space as dotted ones. Of a key that stands in both forms the later adds to the earlier."""
    if not isinstance(space, dict):
        return space
    found: dict[str, Any] = {}
    for key, value in space.items():
        path = f"{prefix}{key}"
        section = isinstance(value, dict) and value and not value.keys() & Parameter.model_fields.keys()
        if section and all(isinstance(item, dict) for item in value.values()):
            inner = _dotted(value, f"{path}.")
        else:
            inner = {path: value}
        for dotted, one in inner.items():
            both = isinstance(one, dict) and isinstance(found.get(dotted), dict)
            found[dotted] = {**found[dotted], **one} if both else one
    return found


class Search(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]
    """Name of the search: letters, digits, `.`, `_`, `-`."""
    run: str | dict[str, Any]
    """What is searched over: a run file, a recipe's name, or the keys of a run themselves."""
    overrides: dict[str, Any] = {}
    """Keys of that run to change, dotted or nested."""
    space: Annotated[dict[str, Parameter], BeforeValidator(_dotted), Field(min_length=1)]
    """Key of the run, dotted or nested → what it may be. Another `method.name`, `train.optimizer` or
    `train.schedule.name` drops the run's keys that it has not."""
    metric: Annotated[_Names, Field(min_length=1)] = ["loss"]
    """What to judge by; with sampler `optuna` several, of which schedulers see the first."""
    mode: _Modes | None = None
    """Whether less or more is better, for each metric; null: as the metric is."""
    samples: int = Field(16, ge=1)
    """Trials; of sampler `random`, for each combination of `grid` keys. Without such keys it draws nothing twice before
    all of a space that has an end has been drawn."""
    seed: int = Field(0, ge=0, lt=2**31)
    """What is drawn at random. The trials' own seed is the run's `seed`."""
    sampler: _SamplerOrName = RandomSampler(name="random")
    """A name, or a mapping with `name` and its keys."""
    scheduler: _SchedulerOrName = Fifo(name="fifo")
    """A name, or a mapping with `name` and its keys."""
    budget: Budget = Budget()
    concurrency: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Trials at once; `auto`: as many lanes as fit in memory, but 16 of a worker at most, or as many runs as there are
    places for."""
    retries: int = Field(1, ge=0)
    """Times that a trial which failed goes on from its last commit before it is set aside."""
    lanes: Literal["auto", "off"] = "auto"
    """`auto`: trials of low-rank methods share one base, as lanes of one batch. `off`: each is a run by itself."""
    output: str = "searches/{name}"
    """The search's folder: a path or any fsspec URI; `{name}` is the search's name."""

    _raw: dict[str, Any] | None = PrivateAttr(None)
    _whole: dict[str, Any] | None = PrivateAttr(None)

    @field_validator("metric")
    @classmethod
    def _known_metrics(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, n=1)
                tail = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(METRICS)}"
                raise ValueError(f"{name!r} is not known; {tail}")
        if len(set(names)) < len(names):
            raise ValueError("a metric stands twice")
        return names

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        for reason in self._refusals():
            raise ValueError(reason)
        return self

    def _refusals(self) -> Iterator[str]:
        if self.mode and len(self.mode) != len(self.metric):
            yield f"{len(self.metric)} in metric and {len(self.mode)} in mode; give one for each, or leave mode out"
        if len(self.metric) > 1 and self.sampler.name != "optuna":
            yield f"several metrics need sampler: optuna, which looks for trade-offs; {self.sampler.name} has one"
        if self.metric[0] in PLANNED and self.scheduler.name != "fifo":
            yield (
                f"scheduler {self.scheduler.name} watches the first metric, and {self.metric[0]} never changes while a"
                " trial runs; put loss first"
            )
        for key, parameter in self.space.items():
            if self.sampler.name == "grid" and parameter.values is None:
                yield f"space.{key}: sampler grid needs listed values; use choice, integers, or uniform with a step"
            if self.sampler.name == "optuna" and parameter.kind == "grid":
                yield f"space.{key}: sampler optuna chooses what to try; use choice instead of grid"
            if key.split(".")[0] in ("name", "output", "logging", "workers") and key != "workers.count":
                yield f"space.{key}: this key says where and how a trial runs, not what it comes to"
            if self.scheduler.name == "pbt" and parameter.when:
                yield f"space.{key}: scheduler pbt changes parameters in flight and knows no `when`"
            if self.scheduler.name == "pbt" and not _below(key, IN_FLIGHT):
                yield (
                    f"space.{key}: with scheduler pbt trials go on from each other's commits, and"
                    f" {_not_in_flight(key)}; pbt can change {', '.join(IN_FLIGHT)}"
                )
        if self.scheduler.name == "pbt" and self.lanes == "off":
            yield "scheduler pbt: only lanes can go on from each other's commits; leave out lanes: off"
        yield from self._circles()

    def _circles(self) -> Iterator[str]:
        def reaches(key: str, seen: tuple[str, ...]) -> str | None:
            if key in seen:
                return " → ".join((*seen, key))
            found = (reaches(other, (*seen, key)) for other in self.space[key].when if other in self.space)
            return next((path for path in found if path), None)

        for key in self.space:
            if path := reaches(key, ()):
                yield f"space.{key}: its `when` goes round in a circle: {path}"
                return

    # ------------------------------------------------------------------------------------------------------- the trials

    @property
    def folder(self) -> str:
        """The search's folder, with the name filled in."""
        return self.output.replace("{name}", self.name)

    @property
    def modes(self) -> list[Literal["min", "max"]]:
        return self.mode or [METRICS[name] for name in self.metric]

    @property
    def keys(self) -> list[str]:
        """Keys of the space, each behind those that its `when` asks for."""
        ordered: list[str] = []

        def add(key: str) -> None:
            for other in self.space[key].when:
                if other in self.space and other not in ordered:
                    add(other)
            if key not in ordered:
                ordered.append(key)

        for key in self.space:
            add(key)
        return ordered

    def is_active(self, key: str, parameters: Mapping[str, Any]) -> bool:
        """Whether a key's `when` holds, `parameters` being drawn already."""
        for other, wanted in self.space[key].when.items():
            value = parameters[other] if other in parameters else _lookup(self.whole_run(), other)
            if value not in (wanted if isinstance(wanted, list) else [wanted]):
                return False
        return True

    def raw_run(self) -> dict[str, Any]:
        """The run's keys as they are written, overrides applied. Raises ConfigError."""
        if self._raw is None:
            raw = load_raw(self.run)[0] if isinstance(self.run, str) else copy.deepcopy(self.run)
            for key, value in _flat(self.overrides):
                override(raw, f"{key}={json.dumps(value)}")
            self._raw = raw
        return copy.deepcopy(self._raw)

    def whole_run(self) -> dict[str, Any]:
        """The run's keys with their defaults; as they are written, where the run is nothing without its space."""
        if self._whole is None:
            try:
                self._whole = validated(self.raw_run(), "run").dump()
            except ConfigError:
                self._whole = self.raw_run()
        return self._whole

    def trial_folder(self, index: int) -> str:
        return join(self.folder, "trials", f"{index:04d}")

    def run_of(self, parameters: Mapping[str, Any], index: int) -> Run:
        """The run of one trial. Raises ConfigError that names the trial and its parameters."""
        raw = self.raw_run()
        for key in sorted(parameters, key=lambda key: key not in _CHOOSE):
            _set(raw, key, parameters[key])
        raw["name"], raw["output"] = f"{self.name}-{index:04d}", self.trial_folder(index)
        if isinstance(raw.get("data"), dict):
            raw["data"].setdefault("cache", join(self.folder, "data"))
        if self.scheduler.name in ("hyperband", "pbt") and isinstance(raw.get("train"), dict):
            raw["train"]["commit_every"] = None  # at each evaluation, since trials are paused there
        if self.scheduler.name == "pbt" and isinstance(raw.get("train"), dict):
            raw["train"]["keep_last"] = max(raw["train"].get("keep_last") or 0, 8)  # others go on from older ones
        shown = ", ".join(f"{key}={_short(value)}" for key, value in parameters.items())
        return validated(raw, f"trial {index:04d} ({shown})")

    def dump(self) -> dict[str, Any]:
        """The resolved search as plain values, the run's own keys in place of its name."""
        space = {key: parameter.model_dump(mode="json", exclude_defaults=True) for key, parameter in self.space.items()}
        return self.model_dump(mode="json") | {"run": self.raw_run(), "overrides": {}, "space": space}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True, width=110)


def load_search(where: str | Path, overrides: Iterable[str] = ()) -> Search:
    """The search of a YAML file or of a search's folder (its `search.yaml`).

    `overrides` are `dotted.key=value` as for a run. Raises ConfigError with every problem found, and for a run that is
    wrong by itself.
    """
    place = str(where)
    if "://" not in place and Path(place).is_dir():
        place = str(Path(place) / "search.yaml")
    text = search_recipe(place)
    if text is None:
        try:
            text = read_text(place)
        except (FileNotFoundError, IsADirectoryError):
            hint = f"shipped searches: {', '.join(search_recipe_names())}"
            raise ConfigError("no such search file, search folder or recipe", where=place, hint=hint) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"this search file cannot be read: {error}", where=place) from None
    return parse_search(text, place, overrides)


def parse_search(text: str, name: str, overrides: Iterable[str] = ()) -> Search:
    """`load_search` for a text already read; `name` is what errors call it."""
    raw = parse_yaml(text, name)
    for item in overrides:
        override(raw, item)
    if "space" not in raw and "model" in raw:
        raise ConfigError("this is a run, not a search: it has no `space`", where=name, hint="ftray train takes it")
    try:
        search = Search.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, Search)), where=name) from None
    for reason in _run_refusals(search):
        raise ConfigError(reason, where=name)
    return search


def _run_refusals(search: Search) -> Iterator[str]:
    """What the search asks for and its run does not give."""
    raw = search.raw_run()
    data, train = raw.get("data") or {}, raw.get("train") or {}
    held_out = data.get("held_out") or data.get("held_out_fraction")
    judged = [name for name in search.metric if name not in PLANNED]
    if judged and not held_out and "data.held_out_fraction" not in search.space:
        yield f"metric {judged[0]} is of held-out rows: set data.held_out or data.held_out_fraction in the run"
    workers = raw.get("workers") or {}
    if workers.get("min") is not None or workers.get("max") is not None:
        yield "a trial's places are set aside before it starts, so workers.min and max do nothing: set workers.count"
    watches = search.scheduler.name != "fifo"
    if watches and not train.get("evaluate_every") and "train.evaluate_every" not in search.space:
        yield f"scheduler {search.scheduler.name} judges by evaluations: set train.evaluate_every in the run"
    objective = raw.get("objective", "sft")
    if {"accuracy", "margin"} & set(judged) and _lookup({"objective": objective}, "objective.name") != "dpo":
        yield "metrics accuracy and margin are of preferences: set objective: dpo in the run"
    if search.scheduler.name == "hyperband" and not (search.scheduler.max_steps or train.get("steps")):
        yield "scheduler hyperband shares out steps: set train.steps in the run, or scheduler.max_steps"
    yield from _vain_conditions(search)


def _vain_conditions(search: Search) -> Iterator[str]:
    """Of `when`: what no trial has, or no run could have. Its key would stay what it is without a word."""
    for key, parameter in search.space.items():
        for other, wanted in parameter.when.items():
            asked = wanted if isinstance(wanted, list) else [wanted]
            own = _lookup(search.whole_run(), other)
            if other in search.space:
                values = search.space[other].values
                may_be = None if values is None else [*values, own]
                if may_be is not None and (odd := [value for value in asked if value not in may_be]):
                    known = ", ".join(dict.fromkeys(_short(value) for value in values or ()))
                    yield f"space.{key}: its `when` asks for {other}={_short(odd[0])}, and it may be {known}"
                continue
            for value in asked:
                try:
                    search.run_of({} if value == own else {other: value}, 0)
                except ConfigError as error:
                    problem = str(error.what).split("\n")[0]
                    yield f"space.{key}: its `when` asks for {other}={_short(value)}, which no run has: {problem}"
                    break


# ---------------------------------------------------------------------------------------------------------------- small


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(item, dict) and item and "name" not in item:
            yield from _flat(item, path)
        else:
            yield path, item


def _below(key: str, sections: Iterable[str]) -> bool:
    """A dotted key is one of these, or stands in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _not_in_flight(key: str) -> str:
    """Why a run cannot go on from a commit with another value of this key."""
    return next(
        (reason for reason, keys in _NOT_IN_FLIGHT.items() if _below(key, keys)),
        "a run cannot go on from a commit with another value of this key",
    )


_BY_NAME = ("method", "schedule", "format", "objective")


def _lookup(raw: Any, key: str) -> Any:
    """A dotted key's value, None where there is none; a section given by its name alone has that as `name`."""
    for part in key.split("."):
        if isinstance(raw, str) and part == "name":
            return raw
        if isinstance(raw, list):
            raw = raw[int(part)] if part.isdigit() and int(part) < len(raw) else None
        else:
            raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


_CHOOSE = ("method.name", "train.optimizer", "train.schedule.name")
"""Keys whose value says which others there are."""


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. One of `_CHOOSE` drops the keys that its value has not."""
    method = raw.get("method")
    if key == "method.name" and isinstance(method, dict) and method.get("name") != value:
        kinds = {kind.model_fields["name"].annotation.__args__[0]: kind for kind in _method_kinds()}  # type: ignore[union-attr]
        if value in kinds:
            raw["method"] = {k: v for k, v in method.items() if k in kinds[value].model_fields}
    for chooser, section, owners in (
        ("train.optimizer", "train", OWNERS),
        ("train.schedule.name", "train.schedule", SHAPED),
    ):
        kept = _lookup(raw, section)
        if key == chooser and isinstance(kept, dict):
            for name in [name for name in kept if value not in owners.get(name, (value,))]:
                del kept[name]
    override(raw, f"{key}={json.dumps(value)}")


def _method_kinds() -> list[type[Strict]]:
    union = methods.Method.__args__[0]  # type: ignore[attr-defined]
    return list(union.__args__)


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, dict) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
