"""JSON lines, and files that are one JSON list."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from ftray.data.fragments import TOO_LONG, Fragment, blank, checked_object, lines, opened, parse_json
from ftray.data.rows import MAX_ROW_BYTES, BadRow, Raw
from ftray.errors import DataError

_CHUNK = 1 << 20


def read_lines(fragment: Fragment) -> Iterator[Raw]:
    with opened(fragment) as file:
        for number, (line, size) in enumerate(lines(file, fragment.start, fragment.stop), 1):
            if len(line) < size:
                yield Raw(number, None, BadRow(TOO_LONG), line)
                continue
            if number == 1 and not fragment.start:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace() or not line:
                yield blank(number)
                continue
            try:
                value = checked_object(parse_json(line))
            except BadRow as problem:
                yield Raw(number, None, problem, line)
            else:
                yield Raw(number, value)


def read_list(fragment: Fragment) -> Iterator[Raw]:
    """The elements of one list, streamed: memory is one element. A string is a row with the text column alone."""
    column = fragment.extra["column"]
    for number, value in enumerate(_elements(fragment), 1):
        try:
            if isinstance(value, BadRow):
                raise value
            row = {column: value} if isinstance(value, str) else checked_object(value)
        except BadRow as problem:
            yield Raw(number, None, problem, None if value is problem else value)
        else:
            yield Raw(number, row)


def _elements(fragment: Fragment) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    with opened(fragment) as file:
        text = _Text(file, fragment.path)
        if text.next_character() != "[":
            raise DataError(
                "this file is not one JSON list", where=fragment.path, hint="rows line by line are `reader: jsonl`"
            )
        text.skip(1)
        while (character := text.next_character()) != "]":
            yield text.value(decoder)
            character = text.next_character()
            if character == ",":
                text.skip(1)
            elif character != "]":
                raise text.error(f"expected a comma or the list's end, found {character!r}")


class _Text:
    """A decoded file, read piece by piece. Bytes that are not UTF-8 become lone surrogates, found later."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._buffer, self._at, self._passed, self._ended = "", 0, 0, False

    def next_character(self) -> str:
        """The next that is not white space. Raises DataError at the end of the file."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\r\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                raise self.error("the file ends within the list")

    def skip(self, count: int) -> None:
        self._at += count

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                value, end = decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # Cut off by the end of the buffer, or wrong? Only more text tells, up to the limit of a row.
                if len(self._buffer) - self._at > 2 * MAX_ROW_BYTES and error.pos < len(self._buffer) - 16:
                    raise self.error(error.msg) from None
                if not self._more():
                    raise self.error(error.msg) from None
                continue
            except RecursionError:
                raise self.error("a value is nested too deeply") from None
            if end == len(self._buffer) and self._more():
                continue  # a number may go on
            self._at = end
            return value

    def error(self, what: str) -> DataError:
        return DataError(
            f"not JSON after character {self._passed + self._at:,}: {what}",
            where=self._path,
            hint="one list cannot be read past an error; rows line by line (`reader: jsonl`) can",
        )

    def _more(self) -> bool:
        if self._ended:
            return False
        data = self._file.read(max(_CHUNK, len(self._buffer) - self._at))  # doubling keeps a long value linear
        self._ended = not data
        piece = self._decoder.decode(data, final=self._ended)
        self._passed += self._at
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece) or not self._ended
