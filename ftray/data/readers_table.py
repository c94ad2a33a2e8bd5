"""Parquet by row groups, Hugging Face data sets by ranges of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa

from ftray.data.fragments import Fragment
from ftray.data.rows import BadRow, Raw
from ftray.errors import DataError
from ftray.manifest import filesystem, is_local

_BATCH = 512


def read_parquet(fragment: Fragment) -> Iterator[Raw]:
    wanted = set(fragment.extra["columns"])
    try:
        with open_parquet(fragment.uri) as file:
            present = [name for name in file.schema_arrow.names if name in wanted] or file.schema_arrow.names[:1]
            groups = list(range(fragment.start, file.num_row_groups if fragment.stop is None else fragment.stop))
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups, columns=present):
                yield from _rows(batch, number)
                number += batch.num_rows
    except pa.ArrowException as error:
        raise DataError(f"this Parquet file cannot be read: {error}", where=fragment.path) from None


def open_parquet(uri: str) -> Any:
    """A pyarrow ParquetFile on any file system. Raises ArrowInvalid."""
    import pyarrow.parquet as pq

    fs, path = filesystem(uri)
    source: Any = pa.OSFile(path) if is_local(uri) else fs.open(path, "rb")
    try:
        return pq.ParquetFile(source)
    except pa.ArrowException:
        source.close()
        raise


def _rows(batch: pa.RecordBatch, before: int) -> Iterator[Raw]:
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        yield from _rows_one_by_one(batch, before)
        return
    for number, value in enumerate(values, before + 1):
        yield Raw(number, value)


def _rows_one_by_one(batch: pa.RecordBatch, before: int) -> Iterator[Raw]:
    for i in range(batch.num_rows):
        try:
            yield Raw(before + i + 1, batch.slice(i, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            yield Raw(before + i + 1, None, BadRow("not UTF-8"), bytes(error.object))


def read_dataset(fragment: Fragment) -> Iterator[Raw]:
    rows = open_dataset(fragment.uri, fragment.extra["subset"], fragment.extra["split"])
    wanted = [name for name in rows.column_names if name in fragment.extra["columns"]]
    rows = rows.select_columns(wanted or rows.column_names[:1])  # an image that nobody asked for is not decoded
    stop = len(rows) if fragment.stop is None else fragment.stop
    for start in range(fragment.start, stop, _BATCH):
        batch = rows[start : min(start + _BATCH, stop)]
        names = list(batch)
        for k, values in enumerate(zip(*batch.values(), strict=True)):
            yield Raw(start - fragment.start + k + 1, dict(zip(names, values, strict=True)))


@lru_cache(maxsize=4)
def open_dataset(path: str, subset: str | None, split: str) -> Any:
    """A `datasets.Dataset`: a folder of `save_to_disk`, or a hub name. Raises DataError."""
    import os

    import datasets

    datasets.disable_progress_bars()
    try:
        if "://" in path or os.path.isdir(path):
            found = datasets.load_from_disk(path)
            if isinstance(found, datasets.DatasetDict):
                if split not in found:
                    raise DataError(f"no split {split!r}", where=path, hint=f"splits: {', '.join(found)}")
                found = found[split]
        else:
            found = datasets.load_dataset(path, name=subset, split=split)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        text = " ".join(str(error).split())[:200]
        raise DataError(
            f"neither a folder written by save_to_disk nor a data set that the hub gives us: {text}",
            where=path,
            hint="check the source's path, `subset` and `split`; a machine without network needs a local folder",
        ) from None
    return found.with_format(None)
