"""From a space to parameters: what trial `index` tries, as a pure function of (seed, index). No torch, no Ray."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from typing import Any

import numpy as np

from ftray.config.search import Parameter, Search
from ftray.errors import ConfigError

Parameters = dict[str, Any]
"""Dotted key of the run → value, of the keys whose `when` holds."""

_LARGEST_GRID = 100_000


def draw(search: Search, index: int, attempt: int = 0) -> Parameters:
    """What trial `index` of sampler `random` tries. Keys are drawn apart, so that another key, or another order of
    keys, changes none of the others. `grid` keys go through their combinations, all of them for each sample. Another
    `attempt` draws something else in its place."""
    combinations = _grid_of(search)
    sample, combination = divmod(index, len(combinations))
    parameters: Parameters = {}
    for key in search.keys:
        if not search.is_active(key, parameters):
            continue
        if key in combinations[combination]:
            parameters[key] = combinations[combination][key]
        else:
            seeds = [search.seed, sample, zlib.crc32(key.encode())] + ([attempt] if attempt else [])
            random = np.random.default_rng(seeds)
            parameters[key] = _value(search.space[key], random)
    return parameters


def _grid_of(search: Search) -> list[Parameters]:
    keys = [key for key in search.keys if search.space[key].kind == "grid"]
    lists = [search.space[key].values or [] for key in keys]
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]


def _value(parameter: Parameter, random: np.random.Generator) -> Any:
    values = parameter.values
    if values is not None:
        return values[int(random.integers(len(values)))]
    assert parameter.bounds is not None
    low, high = parameter.bounds
    if parameter.kind == "loguniform":
        return float(math.exp(random.uniform(math.log(low), math.log(high))))
    return float(random.uniform(low, high))


def grid(search: Search) -> list[Parameters]:
    """Every combination of all values, the last key changing fastest; what a `when` leaves out makes no copies.
    Raises ConfigError for more than a hundred thousand."""
    found: list[Parameters] = [{}]
    for key in search.keys:
        values = search.space[key].values or []
        found = [p | {key: v} for p in found for v in values] if all(search.is_active(key, p) for p in found) else [
            further
            for p in found
            for further in ([p | {key: v} for v in values] if search.is_active(key, p) else [p])
        ]  # fmt: skip
        if len(found) > _LARGEST_GRID:
            raise ConfigError(
                f"the grid has more than {_LARGEST_GRID:,} combinations",
                where=f"space.{key}",
                hint="list fewer values, or take sampler: random with as many samples as you want trials",
            )
    return found


def how_many(search: Search) -> int:
    """Trials of the whole search."""
    if search.sampler.name == "grid":
        return len(grid(search))
    return search.samples * per_sample(search)


def per_sample(search: Search) -> int:
    """Trials of each sample."""
    return len(_grid_of(search))


def finite(search: Search, most: int) -> int | None:
    """How many different trials there can be; None where there is no end to them, or may be more than `most`."""
    lists = [search.space[key].values for key in search.keys]
    if any(values is None for values in lists) or math.prod(len(values or ()) for values in lists) > most:
        return None
    return len({json.dumps(parameters, sort_keys=True) for parameters in grid(search)})  # a value may be listed twice
