"""Read a run file: YAML, the environment's variables, dotted overrides."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ftray.config.explain import explain
from ftray.config.run import Run
from ftray.errors import ConfigError
from ftray.manifest import read_text


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in _recipes().iterdir() if f.name.endswith(".yaml"))


def _recipes():
    return resources.files("ftray") / "recipes"


def search_recipe_names() -> list[str]:
    """Names of the shipped searches, sorted."""
    folder = _recipes() / "searches"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def search_recipe(name: str) -> str | None:
    """The text of a shipped search; None where there is none of this name."""
    if name not in search_recipe_names():
        return None
    return (_recipes() / "searches" / f"{name}.yaml").read_text(encoding="utf-8")


def load_run(where: str | Path, overrides: Iterable[str] = ()) -> Run:
    """The run of a YAML file, of a run's folder (its `run.yaml`), or of a shipped recipe's name.

    `overrides` are `dotted.key=value` with a YAML value; a number in the path indexes a list.
    Raises ConfigError with every problem found, each with its place and the nearest known key.
    """
    text, name = _read(str(where))
    return parse_run(text, name, overrides)


def parse_run(text: str, name: str, overrides: Iterable[str] = ()) -> Run:
    """`load_run` for a text already read; `name` is what errors call it."""
    raw = parse_yaml(text, name)
    for item in overrides:
        override(raw, item)
    return validated(raw, name)


def load_raw(where: str | Path) -> tuple[dict[str, Any], str]:
    """(keys as they are written, what errors call it) of what `load_run` takes, not yet validated."""
    text, name = _read(str(where))
    return parse_yaml(text, name), name


def validated(raw: dict[str, Any], name: str) -> Run:
    """The run of a mapping. Raises ConfigError."""
    try:
        return Run.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, Run)), where=name) from None


def _read(where: str) -> tuple[str, str]:
    path = Path(where)
    if "://" not in where and path.is_dir():
        path = path / "run.yaml"
        if not path.is_file():
            raise ConfigError("this folder holds no run.yaml, so it is not a run", where=where)
    if "://" not in where and path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"this run file cannot be read: {error}", where=where) from None
    if where in recipe_names():
        return (_recipes() / f"{where}.yaml").read_text(encoding="utf-8"), f"recipe {where}"
    if "://" in where:
        uri = where if where.endswith((".yaml", ".yml")) else where.rstrip("/") + "/run.yaml"
        try:
            return read_text(uri), uri
        except FileNotFoundError:
            raise ConfigError("no such run file", where=uri) from None
    near = difflib.get_close_matches(where, recipe_names(), n=1)
    raise ConfigError(
        "no such run file, run folder or recipe",
        where=where,
        hint=f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(recipe_names())}",
    )


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping of a YAML text, with the environment filled in; `name` is what errors call it. Raises ConfigError."""
    try:
        raw = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=name) from None
    if not isinstance(raw, dict):
        raise ConfigError("this file should be a mapping of keys", where=name)
    return _interpolate(raw, name)


class _Loader(yaml.SafeLoader):
    """YAML that reads numbers and booleans as YAML 1.2 does (1e-4 is a number, `off` a word) and refuses a key that is
    written twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key is a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _interpolate(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _interpolate(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, name) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise ConfigError(
                f"the environment has no {match[1]}",
                where=name,
                hint=f"set it, or write ${{{match[1]}:-default}}",
            )
        return found

    return _VARIABLE.sub(fill, value)


def override(raw: dict[str, Any], item: str) -> None:
    """Change `raw` by one `dotted.key=value`. Raises ConfigError."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"{item!r} is no override", hint="write key=value, for example train.steps=100")
    *path, last = key.split(".")
    at: Any = raw
    for i, part in enumerate(path):
        if isinstance(at, list):
            at = at[_index(at, part, key)]
            if not isinstance(at, dict | list):
                raise ConfigError(f"{'.'.join(path[: i + 1])} holds a value, not keys", where=item)
            continue
        child = at.get(part)
        if isinstance(child, str) and part in (
            "schedule",
            "format",
            "objective",
            "method",
        ):  # the short form, by name alone
            child = at[part] = {"name": child}
        if child is None:
            child = at[part] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(f"{'.'.join(path[: i + 1])} holds a value, not keys", where=item)
        at = child
    try:
        value = _interpolate(yaml.load(text, Loader=_Loader), item)
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {error}", where=item) from None
    if isinstance(at, list):
        at[_index(at, last, key)] = value
    else:
        at[last] = value
        if key in ("train.steps", "train.epochs") and value is not None:  # the two exclude each other: the later wins
            at.pop("epochs" if last == "steps" else "steps", None)


def _index(at: Sequence[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(at):
        raise ConfigError(f"{part!r} in {key} is not one of 0…{len(at) - 1}", where=key)
    return int(part)
