"""A fragment is a piece of a file that is prepared in one go; and what its readers share: lines, JSON, reasons."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from ftray.data.rows import MAX_ROW_BYTES, BadRow, Raw
from ftray.errors import DataError
from ftray.manifest import filesystem, is_local

_BUFFER = 1 << 20


@dataclass(frozen=True)
class Fragment:
    """A piece of a file that is prepared in one go."""

    source: int
    """Number of the source in its split."""
    split: str
    """train or held_out."""
    path: str
    """The file, as it is shown."""
    uri: str
    """The file, as it is opened."""
    kind: str
    """jsonl, json, csv, parquet, text, datasets."""
    start: int = 0
    """First byte (jsonl, text, csv), row group (parquet) or row (datasets)."""
    stop: int | None = None
    """One past the last; None: to the end."""
    compression: str | None = None
    take: int | None = None
    """Rows at most; None: all."""
    bytes: int = 0
    """Roughly, for the progress."""
    extra: dict[str, Any] = field(default_factory=dict)
    """csv: delimiter, header. text: column. parquet: columns. datasets: columns, subset, split."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def opened(fragment: Fragment) -> Iterator[Any]:
    """The file, uncompressed, buffered, and for byte ranges seekable."""
    with open_uri(fragment.uri, fragment.compression) as file:
        yield file


@contextmanager
def open_uri(uri: str, compression: str | None) -> Iterator[Any]:
    if is_local(uri) and not compression:
        with open(filesystem(uri)[1], "rb", buffering=_BUFFER) as local:
            yield local
        return
    import fsspec

    try:
        with fsspec.open(uri, "rb", compression=compression) as remote:
            yield io.BufferedReader(remote, _BUFFER) if hasattr(remote, "readinto") else remote
    except (ImportError, ValueError) as error:
        raise DataError(f"this file cannot be opened: {error}", where=uri) from None


def lines(file: Any, start: int, stop: int | None) -> Iterator[tuple[bytes, int]]:
    """(line, its size in bytes) of every line that begins in [start, stop) bytes. Of a line beyond MAX_ROW_BYTES only
    the beginning is handed on, so that it is shorter than its size."""
    position = start
    if start:
        file.seek(start - 1)
        position = start - 1 + sum(len(part) for part in _rest_of_line(file))
    while stop is None or position < stop:
        line = file.readline(MAX_ROW_BYTES + 2)
        if not line:
            return
        size = len(line)
        if size == MAX_ROW_BYTES + 2 and not line.endswith(b"\n"):
            size += sum(len(part) for part in _rest_of_line(file))
        position += size
        yield line, size


def _rest_of_line(file: Any) -> Iterator[bytes]:
    while part := file.readline(_BUFFER):
        yield part
        if part.endswith(b"\n"):
            return


TOO_LONG = f"longer than {MAX_ROW_BYTES >> 20} MiB of text"


def undecodable(line: bytes, error: UnicodeDecodeError) -> BadRow:
    if b"\0" in line:
        return BadRow("binary data")
    return BadRow("not UTF-8", f"byte {error.object[error.start]:#04x} at {error.start + 1}")


def blank(number: int, lines: int = 1) -> Raw:
    """A blank line: no row, but it counts in the file's line numbers."""
    return Raw(number, None, lines=lines)


def parse_json(line: bytes) -> Any:
    """The value of a JSON text. Raises BadRow."""
    import orjson

    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _parse_slowly(line, error)


def _parse_slowly(line: bytes, first: ValueError) -> Any:
    """What orjson refuses may still be JSON to others (a lone surrogate, NaN), and is then judged by its columns."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise undecodable(line, error) from None
    if "\0" in text:
        raise BadRow("binary data")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("not JSON", str(first)[:200]) from None


def checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("not a mapping of columns", f"the row is {'null' if value is None else type(value).__name__}")
    return value
