"""CSV: records may span lines, and one that never closes its quote must not swallow the rows after it."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from ftray.data.fragments import TOO_LONG, Fragment, blank, lines, opened, undecodable
from ftray.data.rows import MAX_ROW_BYTES, BadRow, Raw

csv.field_size_limit(MAX_ROW_BYTES + 1)


class Record(NamedTuple):
    line: int
    """1-based number of its first line, from where reading began."""
    position: int
    """Byte where it begins."""
    lines: int
    fields: list[str] | None
    """None: blank, or `problem` says what is wrong."""
    problem: BadRow | None
    sample: bytes


def read_csv(fragment: Fragment) -> Iterator[Raw]:
    """Rows as {column: text}. Their number is the line on which they begin."""
    header = fragment.extra["header"]
    with opened(fragment) as file:
        for record in records(file, fragment.start, fragment.extra["delimiter"], len(header)):
            if fragment.stop is not None and record.position >= fragment.stop:
                return
            if record.position == 0:
                yield blank(record.line, record.lines)._replace(sample="header")
            elif record.problem is not None:
                yield Raw(record.line, None, record.problem, record.sample, record.lines)
            elif record.fields is None:
                yield blank(record.line, record.lines)
            else:
                yield _row(record, header)


def _row(record: Record, header: list[str]) -> Raw:
    fields = record.fields or []
    if not _encodable(fields):
        try:
            record.sample.decode("utf-8")
            problem = BadRow("not UTF-8")
        except UnicodeDecodeError as error:
            problem = undecodable(record.sample, error)
        return Raw(record.line, None, problem, record.sample, record.lines)
    return Raw(record.line, dict(zip(header, fields, strict=True)), lines=record.lines)


def records(file: Any, start: int, delimiter: str, width: int | None) -> Iterator[Record]:
    """Every record from byte `start`, which must begin one. `width` is the number of fields that each must have.

    A line that opens a quote is joined with those after it until the quotes are even; if that gives no record, the
    first line alone is put aside and reading goes on with the second.
    """
    if start:
        file.seek(start)
    source = _Lines(lines(file, 0, None))
    number, position = 1, start
    while (found := source.take()) is not None:
        line, size = found
        count = 1
        parsed = _parse(line, delimiter, width) if len(line) == size else _Parsed(None, BadRow(TOO_LONG))
        if parsed.problem is not None and parsed.problem.reason == _OPEN and (more := source.until_even(line)):
            joined = b"".join([line, *more])
            together = _parse(joined, delimiter, width)
            if together.problem is None:
                parsed, line, size, count = together, joined, len(joined), 1 + len(more)
            else:
                source.give_back(more)
        yield Record(number, position, count, parsed.fields, parsed.problem, line)
        number, position = number + count, position + size


_OPEN = "a quote is never closed"


class _Parsed(NamedTuple):
    fields: list[str] | None
    problem: BadRow | None


def _parse(line: bytes, delimiter: str, width: int | None) -> _Parsed:
    if b"\0" in line:
        return _Parsed(None, BadRow("binary data"))
    text = line.decode("utf-8", errors="surrogateescape")
    if not text.strip("\r\n"):
        return _Parsed(None, None)
    try:
        [fields] = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except csv.Error as error:
        opened = "unexpected end of data" in str(error)
        return _Parsed(None, BadRow(_OPEN) if opened else BadRow("not CSV", str(error)))
    except ValueError:
        return _Parsed(None, BadRow("not CSV", "a line break outside quotes"))
    if width is not None and len(fields) != width:
        return _Parsed(None, BadRow("wrong number of fields", f"{len(fields)} fields, the header has {width}"))
    return _Parsed(fields, None)


def _encodable(fields: list[str]) -> bool:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Lines:
    """Lines, as (bytes, size), that can be given back."""

    def __init__(self, found: Iterator[tuple[bytes, int]]) -> None:
        self._found, self._back = found, deque[tuple[bytes, int]]()

    def take(self) -> tuple[bytes, int] | None:
        return self._back.popleft() if self._back else next(self._found, None)

    def give_back(self, more: list[bytes]) -> None:
        self._back.extendleft((line, len(line)) for line in reversed(more))

    def until_even(self, first: bytes) -> list[bytes]:
        """The lines after `first` up to the one that makes the quotes even. Empty, and all given back, if none does
        before the limit of a row."""
        more: list[bytes] = []
        quotes, size = first.count(b'"'), len(first)
        while quotes % 2:
            found = self.take()
            if found is None or size + found[1] > MAX_ROW_BYTES:
                if found is not None:
                    self._back.appendleft(found)
                self.give_back(more)
                return []
            more.append(found[0])
            quotes, size = quotes + found[0].count(b'"'), size + found[1]
        return more
