"""Shards: files of prepared rows, in Arrow's IPC format (memory-mapped without a copy, nothing in it is code).

One record batch a few thousand rows; columns, one list a row:
    tokens            int32[T]   token ids
    targets           uint8[T]   1: the token is a label
    sequence_lengths  int32[k]   the sequences in the row, sum = T
    origins           int64[m]   1-based row numbers, counted from the start of the fragment they were read from
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ftray.manifest import filesystem, is_local

SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.int32())),
        ("targets", pa.large_list(pa.uint8())),
        ("sequence_lengths", pa.large_list(pa.int32())),
        ("origins", pa.large_list(pa.int64())),
    ]
)
_BATCH_ROWS = 8192
_BATCH_TOKENS = 4_000_000


class Packed(NamedTuple):
    """One row as it is stored; the columns above."""

    tokens: np.ndarray
    targets: np.ndarray
    sequence_lengths: Sequence[int]
    origins: Sequence[int]


class ShardWriter:
    """Writes one shard. Without a row there is no file. Memory: one record batch."""

    def __init__(self, uri: str) -> None:
        self.uri, self.rows, self.tokens, self.target_tokens = uri, 0, 0, 0
        self._waiting: list[Packed] = []
        self._waiting_tokens = 0
        self._sink: Sink | None = None
        self._file: Any = None

    def add(self, row: Packed) -> None:
        self._waiting.append(row)
        self._waiting_tokens += len(row.tokens)
        if len(self._waiting) >= _BATCH_ROWS or self._waiting_tokens >= _BATCH_TOKENS:
            self._flush()

    def close(self) -> dict[str, Any]:
        """{"rows", "tokens", "target_tokens", "size", "sha256"} of the finished file; size 0: there is none."""
        self._flush()
        counts = {"rows": self.rows, "tokens": self.tokens, "target_tokens": self.target_tokens}
        if self._sink is None:
            return counts | {"size": 0, "sha256": ""}
        self._file.close()
        return counts | self._sink.finish()

    def abort(self) -> None:
        if self._sink is not None:
            self._sink.abort()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._sink is None:
            self._sink = Sink(self.uri)
            self._file = pa.ipc.new_file(pa.PythonFile(self._sink, "wb"), SCHEMA)
        batch = self._waiting
        targets = [row.targets for row in batch]
        self._file.write_batch(
            pa.record_batch(
                [
                    _lists([row.tokens for row in batch], np.int32),
                    _lists(targets, np.uint8),
                    _lists([row.sequence_lengths for row in batch], np.int32),
                    _lists([row.origins for row in batch], np.int64),
                ],
                schema=SCHEMA,
            )
        )
        self.rows += len(batch)
        self.tokens += self._waiting_tokens
        self.target_tokens += int(sum(np.count_nonzero(t) for t in targets))
        self._waiting, self._waiting_tokens = [], 0


def _lists(values: Sequence[Any], dtype: Any) -> pa.LargeListArray:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(v) for v in values], out=offsets[1:])
    flat = np.concatenate(values).astype(dtype, copy=False)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


class Sink:
    """A binary file that is hashed as it is written; on a local disk it appears under its name when finished."""

    def __init__(self, uri: str) -> None:
        fs, self._path = filesystem(uri)
        self._local = is_local(uri)
        self._part = f"{self._path}.{uuid.uuid4().hex[:8]}.part" if self._local else self._path
        self._hash, self._size = hashlib.sha256(), 0
        self._file = open(self._part, "wb") if self._local else fs.open(self._path, "wb")  # noqa: SIM115
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self._size += view.nbytes
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Arrow closes its file; the sink ends with `finish` or `abort`."""

    def finish(self) -> dict[str, Any]:
        if self._local:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if self._local:
            os.replace(self._part, self._path)
        self.closed = True
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def abort(self) -> None:
        """Leave nothing behind, unless it is finished."""
        if self.closed:
            return
        self._file.close()
        self.closed = True
        if self._local and os.path.exists(self._part):
            os.unlink(self._part)
