"""Fragments are read row by row. A reader never raises for a row: what is wrong with it comes in its place."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator

from ftray.data import readers_csv, readers_json, readers_table
from ftray.data.fragments import TOO_LONG, Fragment, blank, lines, opened, undecodable
from ftray.data.rows import BadRow, Raw
from ftray.errors import DataError


def read(fragment: Fragment) -> Iterator[Raw]:
    """Its rows, blank lines left out. Raises DataError when the file itself cannot be read on."""
    reader = {
        "jsonl": readers_json.read_lines,
        "json": readers_json.read_list,
        "csv": readers_csv.read_csv,
        "text": read_text_lines,
        "parquet": readers_table.read_parquet,
        "datasets": readers_table.read_dataset,
    }[fragment.kind]
    try:
        taken = 0
        for raw in reader(fragment):
            if not raw.is_blank:
                if taken == fragment.take:
                    return
                taken += 1
            yield raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"the file cannot be read to its end: {error}", where=fragment.path) from None


def read_text_lines(fragment: Fragment) -> Iterator[Raw]:
    """Each line that is not blank is a row."""
    column = fragment.extra["column"]
    with opened(fragment) as file:
        for number, (line, size) in enumerate(lines(file, fragment.start, fragment.stop), 1):
            if len(line) < size:
                yield Raw(number, None, BadRow(TOO_LONG), line)
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 and not fragment.start else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Raw(number, None, undecodable(line, error), line)
                continue
            if text.strip():
                yield Raw(number, {column: text})
            else:
                yield blank(number)
