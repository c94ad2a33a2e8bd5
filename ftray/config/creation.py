"""What `ftray create` makes: whom it asks, for what, and which rows it keeps. No torch, no Ray."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ftray.config.data import Source
from ftray.config.explain import explain
from ftray.config.reading import override, parse_yaml
from ftray.config.strict import Strict
from ftray.errors import ConfigError


class TeacherSampling(Strict):
    max_tokens: int = Field(1500, ge=1)
    """Tokens of one answer at most; an answer with several rows needs room for all of them."""
    temperature: float = Field(0.8, ge=0, le=2)
    """0 is greedy: then the same prompt has the same answer."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Of the most probable tokens, the fewest whose share of the probability reaches this; 1: all."""
    seed: int | None = 0
    """Sent with each call, raised by one from call to call; null: none is sent, for endpoints that refuse it."""


class Teacher(Strict):
    url: str
    """Of an OpenAI-compatible endpoint, with or without `/v1`. The key comes from FTRAY_API_KEY or OPENAI_API_KEY."""
    model: str
    """Its name there; of our own endpoint a base or an adapter."""
    sampling: TeacherSampling = TeacherSampling()
    """Kept with the rows."""
    response: Literal["text", "json_object", "json_schema"] = "text"
    """What the endpoint is told to answer with: `json_schema` where it can hold a model to one (ours can)."""
    at_once: int = Field(8, ge=1, le=256)
    """Calls in flight."""
    requests_per_minute: float | None = Field(None, gt=0)
    """Requests sent, those sent again included; null: as many as the endpoint takes."""
    tokens_per_minute: float | None = Field(None, gt=0)
    """Tokens of prompts and answers, reckoned before a call is sent; null: no limit."""
    timeout_seconds: float = Field(120, gt=0)
    """For a request without an answer; it is then sent again."""
    tries: int = Field(6, ge=1)
    """Of a call: after 429, 5xx, a timeout or a broken connection, with growing pauses (or as Retry-After says)."""

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address of an endpoint: https://host/v1")
        if "@" in url.split("/")[2]:
            raise ValueError("an address with a password would be kept with the rows; set OPENAI_API_KEY instead")
        return url


class Instructions(Strict):
    """Rows that the teacher makes up: a topic in every call, several rows in every answer."""

    name: Literal["instructions"]
    persona: str = ""
    """Who the teacher is: the system's turn; may use {topic}. Empty: no such turn."""
    topics: list[str] = Field(min_length=1)
    """Call k is about topic k modulo their number."""
    prompt: str
    """Template of the user's turn: {topic}, {count}, {columns}, {number} (of the call), {{ and }} for braces."""
    columns: list[str] = Field(["instruction", "output"], min_length=1)
    """What each row has. The first ones are the question, the last is the answer."""
    rows_per_call: int = Field(5, ge=1, le=100)
    """{count} in the prompt; more in an answer are taken too."""

    @field_validator("columns")
    @classmethod
    def _different(cls, columns: list[str]) -> list[str]:
        if len(set(columns)) < len(columns) or not all(columns):
            raise ValueError("columns need names, each its own")
        return columns


class Answers(Strict):
    """Response-only distillation: the teacher answers given prompts, and its answers are the rows' completions."""

    name: Literal["answers"]
    prompts: list[Source] = Field(min_length=1)
    """Rows that have a prompt; answers that they hold are not shown to the teacher."""
    persona: str = ""
    """The system's turn; empty: none."""
    samples: int = Field(1, ge=1)
    """Answers to each prompt; more than one needs a temperature."""


class Filters(Strict):
    """A row goes through these in this order, and the first that refuses it counts it."""

    characters: dict[str, tuple[int, int]] = {}
    """Fewest and most characters by column, `instruction: [10, 400]`; others: at least one."""
    refuse: list[str] = [r"\bas an ai\b", r"\blanguage model\b"]
    """Regular expressions, of which no column may have one, in any case."""
    language: str | None = Field(None, pattern=r"^[a-z]{2,3}$")
    """Code of the language that the row must be in (`en`, ISO 639); null: any."""
    near: float | None = Field(0.6, gt=0, le=1)
    """Share of pairs of words that a question may have in common with one kept before; null: exact duplicates alone."""
    held_apart: list[Source] = []
    """Test files: no row may be like one of theirs."""
    shared_words: int = Field(13, ge=3)
    """A row that has so many words in a row in common with a test row is refused (13 as in Brown et al. 2020); or one
    whose question is as near to one of theirs as `near` allows."""

    @field_validator("characters")
    @classmethod
    def _ordered(cls, characters: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        for column, (fewest, most) in characters.items():
            if not 0 <= fewest <= most:
                raise ValueError(f"{column}: [{fewest}, {most}] is no range")
        return characters

    @field_validator("refuse")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        import re

        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


class Budget(Strict):
    tokens: int | None = Field(None, ge=1)
    """Of all calls together, prompts and answers, over all resumptions; null: no limit. No call is sent that might
    exceed it, and a try without an answer counts as if it had been paid in full."""
    calls: int | None = Field(None, ge=1)
    """The same for calls."""


class Creation(Strict):
    """Instruction rows made by a teacher model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output: str
    """Folder of the rows, on a disk of this machine: every paid answer is appended to a journal there."""
    rows: int | None = Field(None, ge=1)
    """Rows to keep; null, for `answers` alone: all there are."""
    teacher: Teacher
    ask: Annotated[Union[Instructions, Answers], Field(discriminator="name")]  # noqa: UP007
    """`instructions` or `answers`."""
    filters: Filters = Filters()
    """May be changed later: the answers there are judged again, and nothing is paid again."""
    budget: Budget = Budget()
    patience: int = Field(20, ge=1)
    """Calls in a row that gave no row before it is given up."""

    @model_validator(mode="after")
    def _fits(self) -> Creation:
        if isinstance(self.ask, Instructions):
            if self.rows is None:
                raise ValueError("ask instructions: how many `rows`?")
            columns = self.ask.columns
        else:
            columns = ["prompt", "completion"]
            if self.ask.samples > 1 and self.teacher.sampling.temperature == 0:
                raise ValueError("ask.samples above 1 needs teacher.sampling.temperature above 0")
        if odd := next((c for c in self.filters.characters if c not in columns), None):
            raise ValueError(f"filters.characters: no column {odd!r}; there are {', '.join(columns)}")
        if "://" in self.output and not self.output.startswith("file://"):
            raise ValueError("output: a journal is appended to, so this must be a folder on a disk; copy it afterwards")
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def creation_names() -> list[str]:
    """Names of the shipped recipes of `ftray create`, sorted."""
    return sorted(f.name.removesuffix(".yaml") for f in _folder().iterdir() if f.name.endswith(".yaml"))


def creation_text(name: str) -> str:
    """The recipe's YAML as it is shipped."""
    return (_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def _folder() -> Any:
    return resources.files("ftray") / "recipes" / "creations"


def load_creation(where: str, overrides: Iterable[str] = ()) -> Creation:
    """The creation of a YAML file, of a folder that one has made, or of a shipped recipe's name; `overrides` as in
    `load_run`. Raises ConfigError."""
    path = Path(where)
    if path.is_dir():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            text, name = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"this recipe cannot be read: {error}", where=where) from None
    elif where in creation_names():
        text, name = creation_text(where), f"recipe {where}"
    else:
        near = difflib.get_close_matches(where, creation_names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes: {', '.join(creation_names())}"
        raise ConfigError("no such file, folder or recipe of `ftray create`", where=where, hint=hint)
    raw = parse_yaml(text, name)
    for item in overrides:
        override(raw, item)
    try:
        return Creation.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n  ".join(explain(error, Creation)), where=name) from None
