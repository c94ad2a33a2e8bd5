"""What is asked: rows of data sets as prompts with their references, in words, so that any base can be asked."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ftray import config
from ftray.data.chat import ChatTemplate, checked
from ftray.data.encode import Encoder, Vocabulary
from ftray.data.formats import Rendered, Template, pair_reader, renderer
from ftray.data.readers import read
from ftray.data.rows import BadRow
from ftray.data.sources import files_of, fragments_of
from ftray.data.work import content_hash
from ftray.errors import ConfigError, DataError

Messages = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Asked:
    """One row: what was asked, and the answer that it holds."""

    prompt: str
    """Plain text; of a conversation the last turn before the answer, for people to read."""
    answer: str
    messages: Messages | None
    """The turns before the answer; None: `prompt` stands alone, without a chat template."""
    targets: int = 1
    """Spans of the row that are targets; more than one in a conversation with several answers."""
    where: str = ""
    """`file.csv:12`"""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for rows that ask the same."""
        return (self.prompt, tuple((m["role"], m["content"]) for m in self.messages or ()))


@dataclass(frozen=True)
class Question:
    """What is asked once, with every answer that would be right."""

    asked: Asked
    references: tuple[str, ...]


def questions_of(rows: Iterable[Asked], limit: int | None = None) -> list[Question]:
    """Rows that ask the same become one question, in order of first appearance."""
    answers: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    first: dict[tuple[Any, ...], Asked] = {}
    for row in rows:
        first.setdefault(row.key, row)
        answers[row.key].append(row.answer.strip())  # as answers are, before they are scored
    found = [Question(asked, tuple(answers[key])) for key, asked in first.items()]
    return found[:limit]


# ------------------------------------------------------------------------------------------------------------- reading


def read_rows(sources: Sequence[config.Source], limit: int | None = None) -> list[Asked]:
    """The rows of the sources; those that training would refuse are left out. Raises DataError where none is left."""
    found: list[Asked] = []
    for source in sources:
        ask = _asker(source.format)
        for fragment in fragments_of(source, files_of(source), 0, "held_out"):
            for raw in read(fragment):
                if raw.value is None:
                    continue
                try:
                    found.append(replace(ask(raw.value), where=f"{fragment.path}:{raw.number}"))
                except BadRow:
                    continue
                if len(found) == limit:
                    return found
    if not found:
        raise DataError("no row can be asked", where=", ".join(source.path for source in sources))
    return found


def split_rows(run: config.Run, vocabulary: Vocabulary, limit: int | None = None) -> tuple[list[Asked], list[Asked]]:
    """(training rows, held-out rows) of a run, divided as its training did. Raises DataError."""
    train = read_rows(run.data.sources, limit)
    if run.data.held_out:
        return train, read_rows(run.data.held_out)
    if not run.data.held_out_fraction:
        return train, []
    encoder, prompter = Encoder(vocabulary), Prompter(vocabulary)
    threshold = round(run.data.held_out_fraction * 2**64)
    sides: tuple[list[Asked], list[Asked]] = ([], [])
    tokens = encoder.encode([prompter.whole(row) for row in train])
    for row, (ids, _) in zip(train, tokens, strict=True):
        sides[content_hash(ids, run.seed) < threshold].append(row)
    return sides


def _asker(format: config.Format) -> Any:
    """row → Asked. Raises BadRow inside."""
    if isinstance(format, config.TextFormat):
        return lambda row: Asked("", renderer(format, None)(row).text, None)
    if isinstance(format, config.MessagesFormat):
        return lambda row: _of_messages(row, format.column)
    if isinstance(format, config.PreferenceFormat):
        pair = config.PromptCompletionFormat(
            name="prompt_completion", prompt=f"{{{format.prompt}}}", completion=f"{{{format.chosen}}}", chat=format.chat
        )
        return _asker(pair)
    turn, chat = pair_reader(format), format.chat

    def ask(row: Mapping[str, Any]) -> Asked:
        prompt, answer = turn(row)
        if not answer.strip():
            raise BadRow("empty completion")
        return Asked(prompt, answer, ({"role": "user", "content": prompt},) if chat else None)

    return ask


def ask_only(format: config.Format) -> Callable[[Mapping[str, Any]], Asked]:
    """row → Asked without an answer, whether the row holds one or not. BadRow comes out of the call. Raises ConfigError
    for a format whose rows ask nothing."""
    if isinstance(format, config.MessagesFormat):
        return lambda row: _turns_alone(row, format.column)
    if isinstance(format, config.PromptCompletionFormat):
        template = Template(format.prompt, "prompt")
    elif isinstance(format, config.InstructionFormat):
        turn = pair_reader(format.model_copy(update={"output": format.instruction}))
        return lambda row: _alone(turn(row)[0], format.chat)
    elif isinstance(format, config.PreferenceFormat):
        template = Template(f"{{{format.prompt}}}", "prompt")
    else:
        raise ConfigError("rows of format `text` ask nothing", where="format", hint="prompt_completion or messages")
    chat = format.chat
    return lambda row: _alone(template(row), chat)


def _alone(prompt: str, chat: bool) -> Asked:
    if not prompt.strip():
        raise BadRow("empty prompt")
    return Asked(prompt, "", ({"role": "user", "content": prompt},) if chat else None)


def _turns_alone(row: Mapping[str, Any], column: str) -> Asked:
    if column not in row:
        raise BadRow(f"missing column {column!r}")
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise BadRow("messages are not a list of turns")
    answered = isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant"
    *before, _ = checked(turns if answered else [*turns, {"role": "assistant", "content": "-"}])
    if not before:
        raise BadRow("messages hold no question")
    return Asked(before[-1]["content"], "", tuple(before))


def _of_messages(row: Mapping[str, Any], column: str) -> Asked:
    if column not in row:
        raise BadRow(f"missing column {column!r}")
    *before, last = checked(row[column])
    answers = sum(turn["role"] == "assistant" for turn in before) + 1
    return Asked(before[-1]["content"], last["content"], tuple(before), answers)


# ----------------------------------------------------------------------------------------------------------- rendering


class Prompter:
    """How one base is asked: its tokenizer, its chat template, examples in front."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._chat: ChatTemplate | None = vocabulary.chat
        self._encoder = Encoder(vocabulary)
        self._vocabulary = vocabulary

    def whole(self, row: Asked, examples: Sequence[Asked] = ()) -> Rendered:
        """Question and answer, the answer as the target; without examples exactly what training sees."""
        if row.messages is None:
            before = "".join(_example(example) for example in examples) + (_asked(row) if examples else row.prompt)
            text = before + row.answer
            return Rendered(text, ((len(before), len(text)),), False)
        turns = [*_turns(examples), *row.messages, {"role": "assistant", "content": row.answer}]
        text, spans = self._template().render(turns)
        return Rendered(text, list(spans)[-row.targets :], True)

    def tokens(self, row: Asked, examples: Sequence[Asked] = ()) -> tuple[int, ...]:
        """The tokens up to where the answer begins. Raises ConfigError for rows that ask nothing."""
        if row.messages is None:
            if not row.prompt:
                raise ConfigError(
                    "rows of format `text` ask nothing that could be answered",
                    where="evaluate.metrics",
                    hint="leave the metrics out: losses are taken; or evaluate rows of another format",
                )
            text = "".join(_example(example) for example in examples) + (_asked(row) if examples else row.prompt)
            ids = self._encoder.ids(text, special=True)
            return ids[:-1] if ids and ids[-1] == self._vocabulary.eos_id else ids
        text = self._template().prompt([*_turns(examples), *row.messages])
        return self._encoder.ids(text, special=False)

    def encoded(self, rows: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens int32[T], targets bool[T]) of each."""
        return self._encoder.encode(rows)

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            raise DataError(
                "this base has no chat template, and the rows are conversations",
                hint="give one with data.chat_template, or evaluate rows without `chat`",
            )
        return self._chat


BETWEEN = "\n\n"
"""Between plain examples; an answer to a question with examples in front ends before it."""


def _asked(row: Asked) -> str:
    """A plain prompt that an answer follows, also where training has nothing between the two."""
    return row.prompt if row.prompt[-1:].isspace() else f"{row.prompt}\n"


def _example(row: Asked) -> str:
    return f"{_asked(row)}{row.answer.strip()}{BETWEEN}"


def _turns(examples: Sequence[Asked]) -> Iterator[dict[str, Any]]:
    for example in examples:
        assert example.messages is not None
        yield from (m for m in example.messages if m["role"] != "system")
        yield {"role": "assistant", "content": example.answer}


# ------------------------------------------------------------------------------------------------------------ examples


class Examples:
    """Training rows to show in a prompt. `similar`: for each question those whose prompts share most of its words, rare
    words counting more (cosine over TF-IDF, Salton and Buckley 1988), the most similar last; else the same ones for
    all, drawn by `seed`."""

    def __init__(self, rows: Sequence[Asked], seed: int, *, similar: bool) -> None:
        self.rows, self.similar = list(rows), similar
        self._drawn = list(range(len(self.rows)))
        random.Random(seed).shuffle(self._drawn)
        if similar:
            self._index()

    def of(self, row: Asked, count: int) -> list[Asked]:
        """`count` rows, fewer where there are not so many; never one that asks the same as `row`."""
        if not self.similar:
            chosen = (self.rows[i] for i in self._drawn if self.rows[i].key != row.key)
            return [example for example, _ in zip(chosen, range(count), strict=False)]
        scores = self._scores(row)
        found: list[Asked] = []
        asked = {row.key}
        for i in np.argsort(-scores, kind="stable"):
            if len(found) == count:
                break
            if self.rows[i].key not in asked:  # rows that ask the same would fill the prompt with one question
                asked.add(self.rows[i].key)
                found.append(self.rows[i])
        return found[::-1]

    def _index(self) -> None:
        counted = [Counter(_words(row.prompt)) for row in self.rows]
        seen: Counter[str] = Counter(word for counts in counted for word in counts)
        self._rarity = {word: math.log(len(self.rows) / count) + 1 for word, count in seen.items()}
        places: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for i, counts in enumerate(counted):
            length = math.sqrt(sum((n * self._rarity[w]) ** 2 for w, n in counts.items())) or 1.0
            for word, n in counts.items():
                places[word].append((i, n * self._rarity[word] / length))
        self._places = {
            word: (np.array([i for i, _ in of]), np.array([weight for _, weight in of])) for word, of in places.items()
        }

    def _scores(self, row: Asked) -> np.ndarray:
        scores = np.zeros(len(self.rows))
        for word, n in Counter(_words(row.prompt)).items():
            if word in self._places:
                at, weights = self._places[word]
                scores[at] += n * self._rarity[word] * weights
        return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
