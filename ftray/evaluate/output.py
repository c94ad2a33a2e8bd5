"""The file of a generation's answers: JSON lines, or Parquet where its name ends so."""

from __future__ import annotations

import json
from typing import Any

from ftray.data.shards import Sink


class Output:
    """Takes parts of JSON lines, in order. Nothing is there under its name until `finish`. Raises OSError."""

    def __init__(self, uri: str) -> None:
        self._sink = Sink(uri)
        self._parquet: Any = None
        self._is_parquet = uri.lower().endswith((".parquet", ".pq"))

    def write(self, lines: bytes) -> None:
        """A part; in Parquet one row group, whose column `input` is JSON, since rows' columns differ."""
        if not self._is_parquet:
            self._sink.write(lines)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._parquet is None:
            self._parquet = pq.ParquetWriter(pa.PythonFile(self._sink, "wb"), _schema(), compression="zstd")
        rows = [json.loads(line) for line in lines.splitlines()]
        for row in rows:
            row["input"] = json.dumps(row["input"], ensure_ascii=False) if row["input"] is not None else None
            for name in ("input", "answer", "error"):  # a lone surrogate is no UTF-8
                if row[name] is not None:
                    row[name] = row[name].encode("utf-8", "replace").decode()
        self._parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()))

    def finish(self) -> dict[str, Any]:
        """{"size", "sha256"} of the finished file."""
        if self._parquet is not None:
            self._parquet.close()
        return self._sink.finish()

    def abort(self) -> None:
        """Leave nothing behind, unless it is finished."""
        self._sink.abort()


def _schema() -> Any:
    import pyarrow as pa

    whole, text = pa.int64(), pa.string()
    return pa.schema(
        [
            ("row", whole),
            ("input", text),
            ("adapter", text),
            ("answer", text),
            ("finish_reason", text),
            ("prompt_tokens", whole),
            ("tokens", whole),
            ("error", text),
        ]
    )
