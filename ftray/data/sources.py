"""Sources: which files a run's `data.sources` stand for, told apart by fingerprint, cut into fragments. No Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftray import config
from ftray.data.formats import columns_of
from ftray.data.fragments import Fragment, open_uri
from ftray.data.readers import read
from ftray.data.remote import fingerprint
from ftray.data.tokenizer import nearest_existing
from ftray.errors import DataError
from ftray.manifest import digest_of, filesystem, is_local, sha256

_KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".txt": "text", ".md": "text",
}  # fmt: skip
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_HASHED_BYTES = 256 << 20
"""The local files of a source up to this size are told apart by content; larger ones by size and time."""

FRAGMENT_BYTES = 8 << 20
"""A fragment of a text file: some seconds of work."""
_MOST_FRAGMENTS = 4096
_DATASET_ROWS = 50_000


@dataclass(frozen=True)
class File:
    path: str
    """As it is shown."""
    uri: str
    kind: str
    compression: str | None
    bytes: int
    fingerprint: str
    extra: dict[str, Any] = field(default_factory=dict)


def files_of(source: config.Source) -> list[File]:
    """The files of a source, sorted by path. Raises DataError when there is none, or one cannot be told."""
    if source.path.startswith("embedded:"):
        from ftray.embedded import data_path

        shipped = str(data_path(source.path.removeprefix("embedded:")))
        return [replace(f, path=source.path) for f in files_of(source.model_copy(update={"path": shipped}))]
    if source.reader == "datasets" or _is_saved_dataset(source.path):
        return [_dataset(source)]
    found = _matching(source)
    if source.split != "train" or source.subset:
        raise DataError(
            "`split` and `subset` are of Hugging Face data sets, and this is read as files",
            where=source.path,
            hint="leave them out, or set reader: datasets",
        )
    if not found:
        raise DataError("this folder holds no file that can be read", where=source.path, hint=_readable())
    by_content = sum(int(info.get("size") or 0) for _, info in found) <= _HASHED_BYTES
    return [_file(source, uri, info, by_content) for uri, info in found]


def fragments_of(source: config.Source, files: Sequence[File], number: int, split: str) -> list[Fragment]:
    """The files cut into fragments, in order. What comes out depends on the files alone, not on the cluster."""
    total = sum(f.bytes for f in files)
    size = max(FRAGMENT_BYTES, total // _MOST_FRAGMENTS)
    cut = [piece for f in files for piece in _cut(_whole(source, f, number, split), f, size)]
    return cut if source.limit is None else _first_rows(cut, source.limit)


def raw_rows(source: config.Source) -> Iterator[dict[str, Any]]:
    """The rows of a source as its files hold them, one after the other in this process; unreadable ones left out.
    Raises DataError."""
    for fragment in fragments_of(source, files_of(source), 0, "train"):
        yield from (raw.value for raw in read(fragment) if raw.value is not None)


# ------------------------------------------------------------------------------------------------------------- finding


def _is_saved_dataset(path: str) -> bool:
    folder = filesystem(path)[1] if is_local(path) else ""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json") if folder)


def _dataset(source: config.Source) -> File:
    from ftray.data.readers_table import open_dataset

    local = filesystem(source.path)[1] if is_local(source.path) else source.path
    uri = local if os.path.isdir(local) else source.path
    if uri.startswith((".", "/", "~")) and not os.path.isdir(uri):
        raise _nothing(source.path, local)
    rows = open_dataset(uri, source.subset, source.split)
    extra = {"subset": source.subset, "split": source.split, "rows": len(rows)}
    return File(source.path, uri, "datasets", None, int(rows.dataset_size or 0), str(rows._fingerprint), extra)


def _matching(source: config.Source) -> list[tuple[str, dict[str, Any]]]:
    """(URI, info) of each file, sorted."""
    path = os.path.expanduser(source.path)
    try:
        fs, root = filesystem(path)
        if fs.isfile(root):  # before globs: a name may hold a bracket
            names = [root]
        elif any(c in root for c in "*?["):
            names = [name for name in fs.glob(root) if fs.isfile(name) and not name.rsplit("/", 1)[-1].startswith(".")]
        else:
            found = fs.find(root) if fs.isdir(root) else []
            names = [name for name in found if _counts(name[len(root) :].lstrip("/"), source)]
        if not names and not fs.isdir(root):
            raise _nothing(source.path, root if is_local(path) else None)
        return [(name if is_local(path) else fs.unstrip_protocol(name), fs.info(name)) for name in sorted(names)]
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"this source cannot be read: {' '.join(str(error).split())[:200]}", where=source.path
        ) from None


def _counts(name: str, source: config.Source) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return not hidden and (source.reader != "auto" or _kind(name) is not None)


def _nothing(path: str, local: str | None) -> DataError:
    hint = "check the source's path"
    if local is not None:
        there = nearest_existing(local)
        inside = sorted(os.listdir(there))[:8] if os.path.isdir(there) else []
        hint = f"{there} is there" + (
            f", with {', '.join(inside)}" if inside else ", and is empty" if os.path.isdir(there) else ""
        )
    return DataError("no file is found here", where=path, hint=hint)


def _file(source: config.Source, uri: str, info: dict[str, Any], by_content: bool) -> File:
    shown = os.path.relpath(uri) if is_local(uri) and not os.path.isabs(os.path.expanduser(source.path)) else uri
    compression = _COMPRESSIONS.get(Path(uri).suffix.lower())
    kind = source.reader if source.reader != "auto" else _kind(uri)
    if kind is None:
        raise DataError(
            "the file's ending says nothing about what is in it", where=shown, hint=f"set `reader`; {_readable()}"
        )
    if kind == "json" and source.reader == "auto" and _first_character(uri, compression) == b"{":
        kind = "jsonl"
    size = int(info.get("size") or 0)
    extra: dict[str, Any] = {}
    if kind == "csv":
        extra = _csv_facts(uri, compression, shown)
    return File(shown, uri, kind, compression, size, _fingerprint(uri, info, by_content), extra)


def _kind(name: str) -> str | None:
    path = Path(name.lower())
    return _KINDS.get(path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix)


def _readable() -> str:
    return f"endings that are known: {', '.join(_KINDS)}, and before {', '.join(_COMPRESSIONS)}"


def _first_character(uri: str, compression: str | None) -> bytes:
    with open_uri(uri, compression) as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]


def _fingerprint(uri: str, info: dict[str, Any], by_content: bool) -> str:
    if is_local(uri):
        return sha256(uri) if by_content else f"size={os.path.getsize(uri)} mtime={os.stat(uri).st_mtime_ns}"
    return " ".join(fingerprint(info))


def _csv_facts(uri: str, compression: str | None, shown: str) -> dict[str, Any]:
    """Delimiter by the file's ending, header by its first record."""
    from ftray.data.readers_csv import records

    name = Path(uri.lower())
    ending = name.with_suffix("").suffix if compression else name.suffix
    delimiter = "\t" if ending == ".tsv" else ","
    with open_uri(uri, compression) as file:
        first = next(records(file, 0, delimiter, None), None)
    if first is None or not first.fields:
        problem = first.problem.reason if first is not None and first.problem else "it is empty"
        raise DataError(f"no header in the first line: {problem}", where=shown)
    header = [first.fields[0].removeprefix("\ufeff"), *first.fields[1:]]
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise DataError(f"the header names column {twice!r} twice", where=f"{shown}:1")
    return {"delimiter": delimiter, "header": header}


# -------------------------------------------------------------------------------------------------------------- cutting


def _whole(source: config.Source, file: File, number: int, split: str) -> Fragment:
    extra = dict(file.extra)
    if file.kind in ("text", "json"):
        extra["column"] = source.format.column if isinstance(source.format, config.TextFormat) else "text"
    if file.kind in ("parquet", "datasets"):
        extra["columns"] = columns_of(source.format)
    return Fragment(
        number, split, file.path, file.uri, file.kind, compression=file.compression, bytes=file.bytes, extra=extra
    )


def _cut(whole: Fragment, file: File, size: int) -> list[Fragment]:
    if whole.kind == "parquet":
        return _cut_parquet(whole, size)
    if whole.kind == "datasets":
        rows = file.extra["rows"]
        return _ranges(whole, list(range(0, rows, _DATASET_ROWS)), rows)
    if whole.compression or whole.kind == "json" or whole.bytes <= size:
        return [whole]
    if whole.kind == "csv":
        return _ranges(whole, _csv_starts(whole, size), whole.bytes)
    return _ranges(whole, list(range(0, whole.bytes, size)), whole.bytes)


def _ranges(whole: Fragment, starts: list[int], end: int) -> list[Fragment]:
    """One fragment from each start to the next."""
    pieces = max(len(starts), 1)
    stops = [*starts[1:], end]
    return [
        replace(whole, start=a, stop=b, bytes=whole.bytes // pieces)
        for a, b in zip(starts, stops, strict=True)
        if a < b
    ]


def _cut_parquet(whole: Fragment, size: int) -> list[Fragment]:
    import pyarrow as pa

    from ftray.data.readers_table import open_parquet

    try:
        with open_parquet(whole.uri) as file:
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    except pa.ArrowException as error:
        raise DataError(f"this Parquet file cannot be read: {error}", where=whole.path) from None
    starts, filled = [0], 0
    for i, group in enumerate(groups):
        if filled and filled + group > size:
            starts.append(i)
            filled = 0
        filled += group
    return _ranges(whole, starts, len(groups))


def _csv_starts(whole: Fragment, size: int) -> list[int]:
    """Bytes at which a record begins, about `size` apart, found by the reader's own parser."""
    from ftray.data.readers_csv import records

    starts = [0]
    with open_uri(whole.uri, None) as file:
        for record in records(file, 0, whole.extra["delimiter"], len(whole.extra["header"])):
            if record.position >= starts[-1] + size:
                starts.append(record.position)
    return starts


def _first_rows(fragments: list[Fragment], limit: int) -> list[Fragment]:
    """The fragments that hold the first `limit` rows, the last of them told where to stop."""
    kept, left = [], limit
    for fragment in fragments:
        if left <= 0:
            break
        piece = replace(fragment, take=left)
        kept.append(piece)
        left -= sum(not raw.is_blank for raw in read(piece))
    return kept


def describe_sources(sources: Sequence[config.Source], files: Sequence[Sequence[File]]) -> str:
    """Digest of everything about the sources that shapes the rows and how often they come."""
    described = [
        [source.model_dump(mode="json", exclude={"path"}), [[f.path, f.kind, f.fingerprint] for f in found]]
        for source, found in zip(sources, files, strict=True)
    ]
    return digest_of(described)
