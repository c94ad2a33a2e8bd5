"""Formats: a row's columns become a text with the spans that are to be learned. No torch, no Ray.

A renderer takes a row (a mapping) and returns `Rendered`; a row that it cannot use raises `BadRow` with the reason.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ftray import config
from ftray.data.chat import ChatTemplate
from ftray.data.rows import MAX_ROW_BYTES, BadRow
from ftray.errors import ConfigError, DataError


class Rendered(NamedTuple):
    text: str
    spans: Sequence[tuple[int, int]]
    """[start, end) in characters: tokens that touch a span are targets."""
    whole: bool
    """True: the text is complete, special tokens included (chat). False: the tokenizer adds what it adds to any text,
    and the end-of-text token follows as a target."""


Renderer = Callable[[Mapping[str, Any]], Rendered]

_PREAMBLE = "Below is an instruction that describes a task"
_RESPONSE = " Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA = f"{_PREAMBLE}.{_RESPONSE}### Response:\n"
_FURTHER = ", paired with an input that provides further context."
ALPACA_WITH_INPUT = f"{_PREAMBLE}{_FURTHER}{_RESPONSE}### Input:\n{{input}}\n\n### Response:\n"
"""Taori et al. 2023, "Stanford Alpaca", with the line break before the response that its users settled on."""


def renderers(format: config.Format, chat: ChatTemplate | None) -> tuple[Renderer, ...]:
    """One renderer for each sequence that a row becomes: of a preference the chosen and the rejected one, of all else
    one. Raises DataError when the format needs a chat template and there is none."""
    if not isinstance(format, config.PreferenceFormat):
        return (renderer(format, chat),)
    template = _needed(chat) if format.chat else None

    def side(column: str) -> Renderer:
        def render(row: Mapping[str, Any]) -> Rendered:
            prompt, completion = _preference(row, format, column)
            return _chat(template, _as_messages(prompt, completion)) if template else _pair(prompt, completion)

        return render

    return side(format.chosen), side(format.rejected)


def renderer(
    format: config.TextFormat | config.PromptCompletionFormat | config.InstructionFormat | config.MessagesFormat,
    chat: ChatTemplate | None,
) -> Renderer:
    """The renderer of a format whose rows become one sequence. Raises DataError when it needs a chat template and there
    is none."""
    if isinstance(format, config.TextFormat):
        return lambda row: _text(row, format.column)
    if isinstance(format, config.MessagesFormat):
        template = _needed(chat)
        return lambda row: _chat(template, _column(row, format.column))
    turn = pair_reader(format)
    if format.chat:
        template = _needed(chat)
        return lambda row: _chat(template, _as_messages(*turn(row)))
    return lambda row: _pair(*turn(row))


def pair_reader(
    format: config.PromptCompletionFormat | config.InstructionFormat,
) -> Callable[[Mapping[str, Any]], tuple[str, str]]:
    """row → (prompt, completion) of a format that has both; the prompt is a user turn's words with `chat`."""
    if isinstance(format, config.PromptCompletionFormat):
        prompt, completion = Template(format.prompt, "prompt"), Template(format.completion, "completion")
        return lambda row: (prompt(row), completion(row))
    return lambda row: _instruction(row, format)


def columns_of(format: config.Format) -> list[str]:
    """The columns that a format reads, needed and optional."""
    if isinstance(format, config.TextFormat | config.MessagesFormat):
        return [format.column]
    if isinstance(format, config.PromptCompletionFormat):
        both = [*Template(format.prompt, "prompt").columns, *Template(format.completion, "completion").columns]
        return list(dict.fromkeys(both))
    if isinstance(format, config.PreferenceFormat):
        return [format.prompt, format.chosen, format.rejected]
    return [c for c in (format.instruction, format.input, format.output) if c]


class Template:
    """`{column}` with `{{` and `}}` for braces, and nothing else of str.format: a column's name may hold any other
    character. Raises ConfigError for a template that says more."""

    def __init__(self, template: str, key: str) -> None:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(
                f"{template!r} is no template: {error}",
                where=f"format.{key}",
                hint="a literal brace is written {{ or }}",
            ) from None
        for _, field, spec, conversion in parts:
            if field == "" or spec or conversion:
                raise ConfigError(
                    f"{template!r}: between braces stands a column's name alone",
                    where=f"format.{key}",
                    hint="for example {prompt}",
                )
        self._parts = [(text, field) for text, field, _, _ in parts]
        self.columns = [field for _, field in self._parts if field is not None]

    def __call__(self, row: Mapping[str, Any]) -> str:
        return "".join([text + (_filled(row, field) if field is not None else "") for text, field in self._parts])


def _filled(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column, row)
    if type(value) is str:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return _column(row, column, str)


def _column(row: Mapping[str, Any], column: str, kind: type | None = None) -> Any:
    """The column's value. Raises BadRow when it is missing, null, or not of the kind."""
    if column not in row:
        raise BadRow(f"missing column {column!r}", f"the row has {_names(row)}")
    value = row[column]
    if value is None:
        raise BadRow(f"column {column!r} is null")
    if kind is not None and not isinstance(value, kind):
        raise BadRow(f"column {column!r} is {_kind(value)}, not text")
    return value


def _names(row: Mapping[str, Any]) -> str:
    names = [str(name) for name in row]
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "no columns"


def _kind(value: Any) -> str:
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "a mapping",
        bytes: "binary",
    }
    return names.get(type(value), f"of type {type(value).__name__}")


def _text(row: Mapping[str, Any], column: str) -> Rendered:
    text = _column(row, column, str)
    if not text.strip():
        raise BadRow("empty text")
    return Rendered(_sound(text), ((0, len(text)),), False)


def _pair(prompt: str, completion: str) -> Rendered:
    if not completion.strip():
        raise BadRow("empty completion")
    text = prompt + completion
    return Rendered(_sound(text), ((len(prompt), len(text)),), False)


def _instruction(row: Mapping[str, Any], format: config.InstructionFormat) -> tuple[str, str]:
    instruction = _column(row, format.instruction, str)
    output = _column(row, format.output, str)
    given = row.get(format.input) if format.input else None
    if given is not None and not isinstance(given, str):
        raise BadRow(f"column {format.input!r} is {_kind(given)}, not text")
    if format.chat:
        return (f"{instruction}\n\n{given}" if given else instruction), output
    if given:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=given), output
    return ALPACA.format(instruction=instruction), output


def _preference(row: Mapping[str, Any], format: config.PreferenceFormat, column: str) -> tuple[str, str]:
    """(prompt, completion of `column`)"""
    prompt, completion = _column(row, format.prompt, str), _column(row, column, str)
    if not completion.strip():
        raise BadRow("empty completion", f"column {column!r}")
    if _column(row, format.chosen) == _column(row, format.rejected):
        raise BadRow("chosen and rejected are the same")
    return prompt, completion


def _as_messages(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _chat(template: ChatTemplate, messages: Any) -> Rendered:
    text, spans = template.render(messages)
    return Rendered(_sound(text), spans, True)


def _needed(chat: ChatTemplate | None) -> ChatTemplate:
    if chat is None:
        raise DataError(
            "this format needs a chat template and the tokenizer has none", hint="give one with data.chat_template"
        )
    return chat


def _sound(text: str) -> str:
    """The text, if it can be UTF-8 and is not beyond the limit."""
    if not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise BadRow("lone surrogate", f"at character {error.start}") from None
    else:
        size = len(text)
    if size > MAX_ROW_BYTES:
        raise BadRow(f"longer than {MAX_ROW_BYTES >> 20} MiB of text", f"{size:,} bytes")
    return text
