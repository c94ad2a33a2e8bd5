"""A command line taken apart, so that single words of it can be replaced."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

OVERRIDE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*=")
"""How `key=value` begins."""


@dataclass
class Word:
    text: str
    """The value: of a positional the whole of it, of an option what it is given; empty for a flag."""
    option: str | None = None
    """`--like`; None for a positional."""
    takes_value: bool = False

    @property
    def is_override(self) -> bool:
        return self.option is None and OVERRIDE.match(self.text) is not None

    def words(self) -> list[str]:
        """As it stands on a command line."""
        if self.option is None:
            return [self.text]
        return [self.option, self.text] if self.takes_value else [self.option]


@dataclass
class CommandLine:
    """`ftray NAME …`."""

    name: str
    words: list[Word]

    @classmethod
    def parse(cls, arguments: Sequence[str], takes_value: Mapping[str, bool]) -> CommandLine:
        """`arguments` begin with the command's name and are known to be well formed; `takes_value` says of each option
        whether a value follows."""
        name, *rest = arguments
        return cls(name, list(_parse(rest, takes_value)))

    @property
    def positionals(self) -> list[Word]:
        """Without overrides."""
        return [word for word in self.words if word.option is None and not word.is_override]

    @property
    def overrides(self) -> list[str]:
        return [word.text for word in self.words if word.is_override]

    def option(self, name: str) -> list[Word]:
        """Every use of an option."""
        return [word for word in self.words if word.option == name]

    def override(self, text: str) -> None:
        """Add `key=value`; the last one of a key counts."""
        self.words.append(Word(text))

    def shell(self, program: Sequence[str]) -> str:
        """The line for a shell, each word quoted where it must be."""
        return shlex.join([*program, self.name, *(text for word in self.words for text in word.words())])


def _parse(rest: Sequence[str], takes_value: Mapping[str, bool]) -> Iterator[Word]:
    i, only_positionals = 0, False
    while i < len(rest):
        text = rest[i]
        i += 1
        if only_positionals or not text.startswith("-") or text == "-":
            yield Word(text)
        elif text == "--":
            only_positionals = True
        else:
            option, equals, value = text.partition("=")
            if not takes_value.get(option, False):
                yield Word("", option)
            elif equals:
                yield Word(value, option, takes_value=True)
            else:
                yield Word(rest[i], option, takes_value=True)
                i += 1
