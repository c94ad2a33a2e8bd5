"""The shipped recipes, by name and first line."""

from __future__ import annotations

import difflib
from importlib import resources

from ftray.config import recipe_names
from ftray.config.creation import creation_names, creation_text
from ftray.config.reading import search_recipe, search_recipe_names
from ftray.errors import ConfigError


def recipe_text(name: str) -> str:
    """The recipe's YAML as it is shipped. Raises ConfigError for an unknown name."""
    if text := search_recipe(name):
        return text
    if name in creation_names():
        return creation_text(name)
    if name not in recipe_names():
        near = difflib.get_close_matches(name, [*recipe_names(), *search_recipe_names()], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(recipe_names())}"
        raise ConfigError("no such recipe", where=name, hint=hint)
    return (resources.files("ftray") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def list_recipes() -> list[tuple[str, str]]:
    """(name, what it is) of every recipe of a run; the latter is the comment in its first line."""
    return [(name, _about(name)) for name in recipe_names()]


def list_search_recipes() -> list[tuple[str, str]]:
    """`list_recipes` for `ftray tune`."""
    return [(name, _about(name)) for name in search_recipe_names()]


def _about(name: str) -> str:
    return recipe_text(name).split("\n", 1)[0].lstrip("# ")
