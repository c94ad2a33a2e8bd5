"""Calls to a teacher: what each asks, by its number alone, and the rows in what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftray.config.creation import Answers, Creation, Instructions, Teacher
from ftray.data.formats import Template
from ftray.data.readers import read
from ftray.data.rows import BadRow
from ftray.data.sources import files_of, fragments_of
from ftray.errors import ConfigError, DataError
from ftray.evaluate.questions import Asked, ask_only
from ftray.evaluate.sieve import Refusal
from ftray.manifest import digest_of

_FIELDS = {"topic", "count", "columns", "number"}


@dataclass(frozen=True)
class Call:
    number: int
    """From 0."""
    messages: tuple[dict[str, Any], ...]
    about: dict[str, Any]
    """What its rows carry besides their columns."""

    @property
    def characters(self) -> int:
        return sum(len(str(turn["content"])) for turn in self.messages)


def calls_of(creation: Creation) -> Calls:
    """Raises ConfigError for a template that says more than there is, DataError for prompts that cannot be read."""
    return MadeUp(creation.ask) if isinstance(creation.ask, Instructions) else Given(creation.ask)


def shape_of(creation: Creation, calls: Calls) -> str:
    """Digest of everything that shapes calls and answers. The address is not in it: a teacher may move."""
    teacher = creation.teacher
    return digest_of([teacher.model, teacher.sampling.model_dump(mode="json"), teacher.response, calls.shape])


def body_of(call: Call, teacher: Teacher, calls: Calls) -> dict[str, Any]:
    sampling = teacher.sampling
    body: dict[str, Any] = {
        "model": teacher.model,
        "messages": list(call.messages),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed + call.number
    if teacher.response == "json_object":
        body["response_format"] = {"type": "json_object"}
    elif teacher.response == "json_schema":
        schema = {"name": "rows", "strict": True, "schema": _schema(calls.columns)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _schema(columns: Sequence[str]) -> dict[str, Any]:
    row = {
        "type": "object",
        "properties": {column: {"type": "string"} for column in columns},
        "required": list(columns),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"rows": {"type": "array", "items": row}},
        "required": ["rows"],
        "additionalProperties": False,
    }


class MadeUp:
    """Topics in turn, without an end."""

    def __init__(self, ask: Instructions) -> None:
        self._ask = ask
        self._prompt = _template(ask.prompt, "ask.prompt")
        self._persona = _template(ask.persona, "ask.persona")
        self.columns: tuple[str, ...] = tuple(ask.columns)
        self.compared: tuple[str, ...] = tuple(ask.columns[:-1]) or tuple(ask.columns)
        """By these rows are near each other."""
        self.rows_per_call = ask.rows_per_call
        self.shape: Any = ask.model_dump(mode="json")
        """JSON of everything that shapes the calls, but the teacher."""

    def __len__(self) -> int:
        """Calls there can be."""
        return 1 << 40

    def call(self, number: int) -> Call:
        topic = self._ask.topics[number % len(self._ask.topics)]
        fields = {
            "topic": topic,
            "count": str(self._ask.rows_per_call),
            "columns": ", ".join(self.columns),
            "number": str(number + 1),
        }
        return Call(number, _turns(self._persona(fields), self._prompt(fields)), {"topic": topic})

    def rows(self, call: Call, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], Refusal | None]:
        """(rows in an answer, not yet judged; what is wrong with it besides)."""
        found, whole = objects_in(entry["answer"], self.columns)
        if whole and found:
            return found, None
        cut = "cut off at max_tokens" if entry["finish_reason"] == "length" else "not JSON"
        return found, Refusal("broken answer" if found or cut != "not JSON" else "no rows in the answer", cut)


class Given:
    """Prompts of files, each asked `samples` times."""

    def __init__(self, ask: Answers) -> None:
        self._ask = ask
        self._asked: list[Asked] = []
        self.refused: list[tuple[str, str]] = []
        """(place, reason) of rows that hold no prompt."""
        for source in ask.prompts:
            one = ask_only(source.format)
            for fragment in fragments_of(source, files_of(source), 0, "held_out"):
                for raw in read(fragment):
                    if raw.is_blank:
                        continue
                    try:
                        if raw.problem is not None:
                            raise raw.problem
                        self._asked.append(one(raw.value))
                    except BadRow as problem:
                        self.refused.append((f"{fragment.path}:{raw.number}", problem.reason))
        if not self._asked:
            why = f": {self.refused[0][1]}" if self.refused else ""
            raise DataError(f"there is no prompt{why}", where=", ".join(source.path for source in ask.prompts))
        self.columns: tuple[str, ...] = ("prompt", "completion")
        self.compared = self.columns
        self.rows_per_call = 1
        self.shape: Any = [ask.persona, ask.samples, digest_of([row.key for row in self._asked])]

    def __len__(self) -> int:
        return len(self._asked) * self._ask.samples

    def call(self, number: int) -> Call:
        row = self._asked[number // self._ask.samples]
        turns = row.messages or ({"role": "user", "content": row.prompt},)
        if self._ask.persona and turns[0]["role"] != "system":
            turns = ({"role": "system", "content": self._ask.persona}, *turns)
        return Call(number, turns, {})

    def rows(self, call: Call, entry: dict[str, Any]) -> tuple[list[dict[str, Any]], Refusal | None]:
        if entry["finish_reason"] == "length":
            return [], Refusal("broken answer", "cut off at max_tokens")
        row: dict[str, Any] = {"prompt": call.messages[-1]["content"], "completion": entry["answer"].strip()}
        if len([turn for turn in call.messages if turn["role"] != "system"]) > 1:
            row["messages"] = [*call.messages, {"role": "assistant", "content": row["completion"]}]
        return [row], None


Calls = MadeUp | Given
"""All calls of a creation."""


def _template(text: str, where: str) -> Template:
    template = Template(text, where.removeprefix("ask."))
    if odd := next((name for name in template.columns if name not in _FIELDS), None):
        known = ", ".join(f"{{{name}}}" for name in sorted(_FIELDS))
        raise ConfigError(f"{{{odd}}} is not known", where=where, hint=f"known: {known}; a brace is written {{{{")
    return template


def _turns(system: str, user: str) -> tuple[dict[str, Any], ...]:
    asked = {"role": "user", "content": user}
    return ({"role": "system", "content": system}, asked) if system else (asked,)


def objects_in(text: str, columns: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
    """(the rows in an answer, whether all of its JSON could be read). Teachers put prose or fences around JSON, break
    off in the middle, or leave out the list: every whole object that has one of the columns counts, wherever it is."""
    decoder = json.JSONDecoder(strict=False)
    found: list[dict[str, Any]] = []
    whole, place = True, 0
    while (start := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            whole, place = False, start + 1
            continue
        found += _rows_in(value, columns)
    return found, whole


def _rows_in(value: Any, columns: Sequence[str]) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return [row for item in value for row in _rows_in(item, columns)]
    if not isinstance(value, dict):
        return []
    if any(column in value for column in columns):
        return [value]
    return [row for item in value.values() for row in _rows_in(item, columns)]
